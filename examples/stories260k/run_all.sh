#!/usr/bin/env bash
# Every step in turn, from the start.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

for step in examples/stories260k/0?_*.sh; do
    echo "== $step"
    bash "$step"
done
