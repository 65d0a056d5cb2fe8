"""Loaded once by the fork server, so that its workers share one copy of megatron.core.

Imported anew, it would cost every worker seconds and some 600 MB.
"""

from megatron_emo.data.upstream import import_build_tokenizer

import_build_tokenizer()
