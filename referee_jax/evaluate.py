"""Scores a run directory, or a folder of images in a benchmark's own layout.

    python -m referee_jax.evaluate --workdir=runs/mine --benchmark=shapes
    python -m referee_jax.evaluate --workdir=runs/mine --benchmark=t2i_compbench --lists=T2I-CompBench/examples/dataset
    python -m referee_jax.evaluate --workdir=runs/mine --referee=yuvalkirstain/PickScore_v1 --referee=shapes/blip_itm
    python -m referee_jax.evaluate --workdir=runs/mine --benchmark=shapes --vqa=shapes/blip_vqa --referee=shapes/clip
    python -m referee_jax.evaluate --workdir=runs/mine --benchmark=geneval2 --metadata=geneval2_data.jsonl
    python -m referee_jax.evaluate --workdir=runs/mine --export=t2i_compbench --out=exported \
        --lists=T2I-CompBench/examples/dataset
    python -m referee_jax.evaluate --workdir=exported --benchmark=t2i_compbench --import_scores=exported \
        --lists=T2I-CompBench/examples/dataset

Writes `evaluation/` in the directory, or `--out`: for each measure a file of scores, with which an
interrupted evaluation continues; `images.jsonl`, all scores of each image; and `scores.json`, the printed
table: means with 95 % intervals (bootstrap over prompts). In the shapes world, where a detector knows
which pictures are right, a second table shows how well the other scores agree with it, and `fooled.png`
the wrong pictures to which each of them gives the highest scores.

Imported scores are not measured again and need no weights, unless --vqa or --clip is given;
`scores.json` names the source of each score. Exit codes: 0 done, 2 the command cannot be carried out.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags, logging

from referee_jax import cli
from referee_jax.benchmarks import evaluation, geneval2, layouts, noun_phrases, t2i_compbench
from referee_jax.storage import objects


def evaluate(args) -> str:
    """Carries out the command; returns what to print. Raises ValueError for what cannot be done."""
    directory = objects.local_only(args.workdir)
    folder = directory.parent if directory.is_file() else directory
    if args.export:
        return export(args.export, evaluation.read(directory), Path(args.out or folder / args.export), args)
    return evaluation.evaluate(
        directory,
        Path(args.out or folder / "evaluation"),
        benchmark=args.benchmark,
        referees=args.referee,
        lists=args.lists,
        category=args.category,
        vqa=args.vqa,
        clip=args.clip,
        rule=args.noun_phrases,
        import_scores=args.import_scores,
        truncate=args.truncate,
        data=args.metadata,
    )


def export(benchmark: str, entries: Sequence[layouts.Entry], out: Path, args) -> str:
    """Writes the folder that the official scorers of a benchmark read."""
    if benchmark == "geneval":
        if not args.metadata:
            raise ValueError("--metadata is missing: GenEval's evaluation_metadata.jsonl")
        count = layouts.export_geneval(entries, out, args.metadata, per_prompt=args.per_prompt or 4)
        return f"{count} images in {out}\n"
    if benchmark == "geneval2":
        count, samples = geneval2.export(entries, out, evaluation.read_rows(benchmark, args.metadata))
        return f"{count} images in {out}, {', '.join(geneval2.PATHS.format(n) for n in range(samples))}\n"
    order, note = None, ""
    if args.lists:
        prompts = {entry.prompt for entry in entries}
        category, listed = t2i_compbench.read_list_of(Path(args.lists), prompts, category=args.category)
        order = [prompt for prompt in listed if prompt in prompts]
        note = f", of {len(order)} of the {len(listed)} prompts of {category}, in their order"
    count = layouts.export_t2i_compbench(entries, out, prompts=order, per_prompt=args.per_prompt or 10)
    return f"{count} images in {out}{note}\n"


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """The command's flags."""
    common = {"flag_values": values}
    flags.DEFINE_string("workdir", None, "run directory, or a folder of images in a benchmark's layout", **common)
    flags.DEFINE_enum(
        "benchmark",
        None,
        ["shapes", "t2i_compbench", "geneval", "geneval2"],
        "the benchmark that the images are for",
        **common,
    )
    cli.define_device(values)
    flags.DEFINE_multi_string(
        "referee", [], "checkpoint of a referee that scores each image; may be repeated", **common
    )
    flags.DEFINE_string(
        "lists", None, "directory of T2I-CompBench's *_val.txt files: what is seen and unseen, and of what kind complex prompts "
        "are. --export takes their order, which the official 3-in-1 needs, or else that of the first images", **common,
    )  # fmt: skip
    flags.DEFINE_enum(
        "category", None, list(t2i_compbench.CATEGORIES), "of all prompts; without --lists there are no parts of it", **common,
    )  # fmt: skip
    flags.DEFINE_string(
        "vqa", None, "BLIP for BLIP-VQA, as weights.lavis converts it, or what answers GenEval 2's questions; what is imported "
        f"of it is left out; empty: none; default: {evaluation.VQA}, of shapes none, of geneval2 {evaluation.QUESTIONED}",
        **common,
    )  # fmt: skip
    flags.DEFINE_string(
        "clip",
        None,
        f"CLIP for CLIPScore; what is imported of it is left out; empty: none; default: {evaluation.CLIP}",
        **common,
    )
    flags.DEFINE_enum(
        "noun_phrases", noun_phrases.NEW, list(noun_phrases.RULES), "which ones BLIP-VQA asks about: new, the first 8 but for "
        "places, as the official scorer does now; old, the first 2 of all, as it did at first", **common,
    )  # fmt: skip
    flags.DEFINE_bool(
        "truncate", None, "cut prompts that are too long for a measure, as its authors do; default: in folders in a benchmark's "
        "layout; in a run directory they are named and left out", **common,
    )  # fmt: skip
    flags.DEFINE_enum(
        "export",
        None,
        ["t2i_compbench", "geneval", "geneval2"],
        "write the folder that its official scorers read",
        **common,
    )
    flags.DEFINE_string(
        "metadata", None, "GenEval's evaluation_metadata.jsonl, for --export=geneval; GenEval 2's geneval2_data.jsonl", **common
    )  # fmt: skip
    flags.DEFINE_integer(
        "per_prompt", None, "images of each prompt, for --export; default: the benchmark's", lower_bound=1, **common
    )
    flags.DEFINE_string(
        "import_scores", None, "exported folder with results, or the result file of GenEval or GenEval 2", **common
    )
    flags.DEFINE_string("out", None, "directory to write; default: within --workdir", **common)


def main(args: flags.FlagValues) -> str:
    """The command line."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    if not args.workdir:
        raise ValueError("--workdir is missing: a run directory, or a folder of images in a benchmark's layout")
    if args.referee or args.vqa or args.benchmark in ("t2i_compbench", "geneval2"):  # networks need a device
        cli.prepare(args.device)
    return evaluate(args)


if __name__ == "__main__":
    define_flags()
    cli.start(main)
