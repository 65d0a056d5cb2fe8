"""Few-shot classification: accuracy of a model on a built-in task or on one of your own.

python tools/evaluate.py icl --model smollm2/ --task sst2 --data cls/ --json sst2.json
python tools/evaluate.py icl --model smollm2/ --task mine.yaml --shots 4 --retriever random
python tools/evaluate.py icl --task sst2 --data cls/ --write-lm-eval lm_eval_tasks/

A task is a small YAML file: files, labels, template. megatron_emo/evaluation/tasks has the
built-in ones, examples/lm_eval/README.md how to write one.
"""

from __future__ import annotations

from dataclasses import asdict

from megatron_emo.evaluation.icl_tasks import (
    DATA_VARIABLE,
    RETRIEVERS,
    built_in_names,
    find_data_dir,
    load_task,
)
from megatron_emo.evaluation.records import Record, hash_model


def add_arguments(parser) -> None:
    """Add the flags."""
    parser.add_argument("--model", metavar="HF_DIR", help="local Hugging Face folder")
    parser.add_argument(
        "--task",
        dest="icl_task",
        required=True,
        metavar="NAME|FILE",
        help=f"one of {', '.join(built_in_names())}, or a YAML file",
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        help=f"of the task's files; default: {DATA_VARIABLE}, or a YAML file's own folder",
    )
    parser.add_argument("--shots", type=int, help="examples before a question; default: the task's")
    parser.add_argument("--retriever", choices=RETRIEVERS, help="default: the task's")
    parser.add_argument(
        "--encoder",
        metavar="HF_DIR",
        help="topk by this model's mean hidden states; default: by TF-IDF",
    )
    parser.add_argument(
        "--order",
        default="nearest-first",
        help="of shots, nearest-first (as OpenICL) or nearest-last; default: %(default)s",
    )
    parser.add_argument(
        "--scoring",
        default="ppl,label",
        help="ppl (whole prompt), label, label-mean (per token), joined by commas; "
        "default: %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--limit", type=int, help="questions, drawn by the seed; default: all")
    parser.add_argument("--max-length", type=int, help="tokens; default: the model's context")
    parser.add_argument("--dtype", default="float32", help="default: %(default)s")
    parser.add_argument("--device", default="auto", help="default: cuda where there is one")
    parser.add_argument(
        "--predictions", metavar="FILE", help="keep each answer here, as JSON lines"
    )
    parser.add_argument("--resume", action="store_true", help="go on with --predictions")
    parser.add_argument("--overwrite", action="store_true", help="replace --predictions")
    parser.add_argument(
        "--write-lm-eval",
        metavar="DIR",
        help="write the task for lm-eval, with its data, and stop",
    )


def run(args) -> list[Record]:
    """Return accuracies and baselines; none with --write-lm-eval.

    Raises:
        ValueError: a flag or a task that cannot be used; see `icl`, `icl_tasks`, `icl_data`.
    """
    from megatron_emo.evaluation.icl import IclSettings
    from megatron_emo.evaluation.icl_data import read_task_data

    scorings = parse_scorings(args.scoring)
    task = load_task(args.icl_task)
    data = read_task_data(task, find_data_dir(args.icl_task, args.data))
    settings = IclSettings(
        shots=task.shots if args.shots is None else args.shots,
        retriever=args.retriever or task.retriever,
        order=args.order,
        seed=args.seed,
        limit=args.limit,
        max_length=args.max_length,
    )
    if args.write_lm_eval:
        from megatron_emo.evaluation.lm_eval_tasks import write_lm_eval

        for path in write_lm_eval(task, data, settings, args.write_lm_eval):
            print(path)
        return []
    if not args.model:
        raise ValueError("--model: expected a Hugging Face folder, got none")
    if (args.resume or args.overwrite) and not args.predictions:
        flag = "--resume" if args.resume else "--overwrite"
        raise ValueError(f"{flag}: expected --predictions with it, got none")
    return _measure(args, task, data, settings, scorings)


def _measure(args, task, data, settings, scorings) -> list[Record]:
    from dataclasses import replace

    from megatron_emo.evaluation.icl import classify, open_answers, summarize
    from megatron_emo.evaluation.icl_data import take_questions
    from megatron_emo.evaluation.icl_scoring import PromptScorer
    from megatron_emo.evaluation.models import load_model
    from megatron_emo.evaluation.retrieval import encoder_of

    loaded = load_model(args.model, dtype=args.dtype, device=args.device)
    settings = replace(settings, max_length=settings.max_length or loaded.context_length)
    features = hash_model(args.encoder) if args.encoder else "tf-idf"
    about = {
        **{"task": task.name, "template": task.template, "task_sha256": task.fingerprint},
        **asdict(settings),
        **{"features": features, "dtype": args.dtype, "split_seed": task.split_seed},
    }
    predictions = None
    if args.predictions:
        whole = {**about, "model_sha256": loaded.sha256, "data": dict(data.hashes)}
        predictions = open_answers(
            *(args.predictions, whole, len(take_questions(data, settings.limit, settings.seed))),
            resume=args.resume,
            overwrite=args.overwrite,
        )
    answers = classify(
        task,
        data,
        PromptScorer(loaded.model),
        loaded.tokenizer,
        settings,
        encode=encoder_of(args.encoder, args.device) if args.encoder else None,
        predictions=predictions,
    )
    if predictions:
        predictions.finish()
    common = {
        "settings": about,
        "seed": settings.seed,
        "labels": {"task": task.name, **args.labels},
        "model": loaded.name,
        "model_sha256": loaded.sha256,
    }
    return summarize(task, data, answers, scorings, common)


def parse_scorings(text: str) -> list[str]:
    """Return the rules that --scoring names.

    Raises:
        ValueError: an unknown one, or none.
    """
    from megatron_emo.evaluation.icl import SCORINGS

    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in SCORINGS]
    if unknown or not names:
        raise ValueError(f"--scoring: expected any of {', '.join(SCORINGS)}, got {text!r}")
    return names
