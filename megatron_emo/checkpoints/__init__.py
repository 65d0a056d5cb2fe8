"""Whether a folder of checkpoints can be trusted: manifests, the tracker, which is the newest whole
one."""

from megatron_emo.checkpoints.choice import Choice, RunFolder, choose, describe
from megatron_emo.checkpoints.keys import check_vocabulary, compare_keys
from megatron_emo.checkpoints.manifest import MANIFEST, Manifest
from megatron_emo.checkpoints.tracker import RELEASE, folder_of, read_tracker, write_tracker
from megatron_emo.checkpoints.whole import Findings, Glance, glance, inspect, sign

__all__ = [
    "MANIFEST",
    "Choice",
    "Findings",
    "Glance",
    "Manifest",
    "RELEASE",
    "RunFolder",
    "check_vocabulary",
    "choose",
    "compare_keys",
    "describe",
    "folder_of",
    "glance",
    "inspect",
    "read_tracker",
    "sign",
    "write_tracker",
]
