"""What torch.distributed is asked for, recorded."""

from __future__ import annotations

import torch.distributed as dist


class CollectiveCounter:
    """Records (name, elements sent, group) of every collective that torch.distributed is asked
    for."""

    NAMES = (
        "all_reduce",
        "all_gather",
        "all_gather_into_tensor",
        "all_gather_object",
        "broadcast",
        "reduce_scatter_tensor",
        "all_to_all_single",
        "barrier",
        "send",
        "recv",
    )

    def __enter__(self):
        self.calls, self._originals = [], {}
        for name in self.NAMES:
            original = self._originals[name] = getattr(dist, name)

            def record(*args, _name=name, _original=original, **kwargs):
                sent = args[1] if _name.startswith("all_gather") else args[0]
                self.calls.append((_name, sent.numel(), kwargs.get("group")))
                return _original(*args, **kwargs)

            setattr(dist, name, record)
        return self

    def __exit__(self, *_):
        for name, original in self._originals.items():
            setattr(dist, name, original)
