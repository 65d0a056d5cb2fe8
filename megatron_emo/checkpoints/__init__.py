"""Whether a folder of checkpoints can be trusted: manifests, the tracker, which is the newest whole
one."""
