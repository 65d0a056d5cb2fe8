"""What is known of metrics beside their records: which end is the good one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

ENDS = ("high", "low")

BETTER: Mapping[str, str] = {
    **dict.fromkeys(("mauve", "mauve-star"), "high"),
    **dict.fromkeys(("accuracy", "accuracy_group_mean", "macro_f1"), "high"),
    **dict.fromkeys(
        ("token_perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"), "low"
    ),
    **dict.fromkeys(("forward_cross_entropy", "reverse_cross_entropy", "cross_entropy"), "low"),
    **dict.fromkeys(("forward_kl", "reverse_kl", "js", "tvd", "frontier-integral"), "low"),
    **dict.fromkeys(("avg_js", "reverse_kl_support", "reverse_kl_smoothed", "dev_js"), "low"),
    **dict.fromkeys(("leaked_mass", "avg_0s", "optimum_avg_js"), "low"),
    **dict.fromkeys(("visited_avg_js", "visited_forward_kl", "visited_leaked_mass"), "low"),
}
"""Left out are diversity, repetition, entropy and their like: best is what human texts have."""


def parse_better(words: Sequence[str]) -> dict[str, str]:
    """Return `BETTER` with the METRIC=high|low of `words` put over it.

    Raises:
        ValueError: a word of another form.
    """
    better = dict(BETTER)
    for word in words:
        metric, _, end = word.partition("=")
        if not metric or end not in ENDS:
            raise ValueError(f"--better: expected METRIC=high or METRIC=low, got {word!r}")
        better[metric] = end
    return better
