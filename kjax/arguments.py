"""The command line: verbs and their options."""

import argparse

GIN_HELP = "--gin.NAME=VALUE (repeatable) binds a setting (Lora.rank) or a macro (RANK) after the files"

AGAIN = "after an interruption the same command goes on from DIR.partial"


def parser() -> argparse.ArgumentParser:
    """Parses into a namespace whose `verb` names what is to be run, "data show" for instance."""
    parser = argparse.ArgumentParser(prog="kjax", description="LoRA fine-tuning of very large mixture-of-experts "
                                     "models on one workstation.", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="command", metavar="VERB", required=True)

    train = _verb(verbs, "train", "fine-tune a model", gin=True)
    after = train.add_mutually_exclusive_group()
    after.add_argument("--resume", nargs="?", const=True, default=False, choices=("changed",),
                       help="go on from the last checkpoint of Train.run_dir; `--resume changed` does so although "
                       "data, base or a binding setting differ")
    after.add_argument("--overwrite", action="store_true", help="replace the run in Train.run_dir")

    chat = _verb(verbs, "chat", "talk to a model, with or without an adapter")
    which = chat.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="DIR", help="a checkpoint directory")
    which.add_argument("--run", metavar="DIR", dest="run_dir", help="a run: its base with its newest adapter")
    chat.add_argument("--adapter", metavar="DIR", help="a PEFT adapter for --model")
    chat.add_argument("--message", metavar="TEXT", help="print one reply and end")
    chat.add_argument("--system", metavar="TEXT", help="the system message")
    _replies(chat)
    chat.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: the run's, else bfloat16")
    chat.add_argument("--experts", choices=("host", "device"), help="default: the run's, else host")
    chat.add_argument("--weights", choices=("full", "8bit", "nf4", "int4"), help="default: the run's, else full")

    evaluate = _verb(verbs, "eval", "loss, perplexity and token accuracy on rows not trained on", gin=True)
    _judged(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print JSON")

    predict = _verb(verbs, "predict", "replies to rows not trained on, and their scores", gin=True)
    _judged(predict)
    _replies(predict)
    predict.add_argument("--out", metavar="DIR", required=True, help="for replies and scores; after an interruption "
                         "the same command goes on there")
    predict.add_argument("--batch", type=_positive, default=16, metavar="N", help="rows continued together (16)")
    predict.add_argument("--score", choices=("auto", "text", "choice"), default="auto", help="text: BLEU and ROUGE; "
                         "choice: the letter of an option; auto (default): by what the rows' own replies are")
    predict.add_argument("--overwrite", action="store_true", help="replace the predictions in DIR")

    data = verbs.add_parser("data", help="look at a dataset").add_subparsers(dest="what", metavar="VERB", required=True)
    show = _verb(data, "show", "print rendered rows with the trained tokens coloured", gin=True)
    show.add_argument("--model", metavar="DIR", help="sets Model.directory: whose tokenizer and template")
    show.add_argument("--dataset", metavar="FILE", help="sets Data.dataset")
    show.add_argument("--rows", type=_positive, default=3, metavar="N")

    config = verbs.add_parser("config", help="look at settings").add_subparsers(
        dest="what", metavar="VERB", required=True)
    _verb(config, "show", "print every setting and where it comes from", gin=True)

    plan = _verb(verbs, "plan", "memory, work and time of a run, from config.json alone", gin=True)
    plan.add_argument("--model", metavar="PATH", help="sets Model.directory: a checkpoint directory or a config.json")
    plan.add_argument("--machine", metavar="NAME", help="a named machine, a JSON file, or `here`, whose speeds are "
                      "measured; without it: the free memory of this machine and no times")
    for name, metavar, text in (
            ("host_gb", "GB", "plan for this much main memory"), ("device_gb", "GB", "plan for a GPU with this much "
             "memory; 0: for none"), ("host_tflops", "X", "what the experts' kernels reach on all cores"),
            ("host_gbs", "GB/s", "what all cores read from memory"), ("device_tflops", "X", "what matrix products "
             "outside the experts reach"), ("device_gbs", "GB/s", "of the device's memory"),
            ("pcie_gbs", "GB/s", "between main memory and device")):
        plan.add_argument(f"--{name}", type=_not_negative, metavar=metavar, help=text)
    plan.add_argument("--json", action="store_true", help="print JSON")

    export = _verb(verbs, "export", "write an adapter as PEFT files for other programs",
                   example="kjax export --run runs/first --out adapter --dtype bfloat16")
    _adapted(export)
    export.add_argument("--out", metavar="DIR", required=True, help="a new directory")
    export.add_argument("--layout", choices=("experts", "fused"), default="experts", help="of routed experts: "
                        "tensors for each expert (default), or fused as peft does with transformers 5")
    export.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    export.add_argument("--base_name", metavar="NAME", help="what to record as the base, for instance its hub name")

    merge = _verb(verbs, "merge", "write a checkpoint with an adapter merged into it, in the base's format",
                  example="kjax merge --run runs/first --out DeepSeek-V3-mine")
    _adapted(merge)
    merge.add_argument("--out", metavar="DIR", required=True, help=f"a new directory; {AGAIN}")
    merge.add_argument("--rounding", choices=("stochastic", "nearest"), default="stochastic", help="of quantised "
                       "weights: right on average (default), or to nearest, which loses changes below half a step")

    quantize = _verb(verbs, "quantize", "write a checkpoint whose routed experts have 8 or 4 bits",
                     example="kjax quantize --model DeepSeek-V3 --format int4 --out DeepSeek-V3-int4")
    quantize.add_argument("--model", metavar="DIR", required=True, help="a checkpoint in bf16 or FP8; never changed")
    quantize.add_argument("--format", required=True, choices=("int8", "int4"),
                          help="int8: groups of 128; int4: groups of 32, the layout of Kimi-K2-Thinking")
    quantize.add_argument("--out", metavar="DIR", required=True, help=f"a new directory; {AGAIN}")

    env = _verb(verbs, "env", "this machine and installation: versions, kernels, memory, GPU")
    env.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _verb(verbs, name: str, text: str, gin: bool = False, example: str = "") -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".",
                              epilog=GIN_HELP if gin else f"example: {example}" if example else None,
                              allow_abbrev=False)
    parser.set_defaults(verb=parser.prog.removeprefix("kjax "))
    if gin:
        parser.add_argument("--gin_file", action="append", default=[], metavar="FILE",
                            help="a gin file, or the name of a packaged one (repeatable, later ones win)")
    return parser


def _adapted(parser: argparse.ArgumentParser):
    """Which model with which adapter: a run's, or any."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", metavar="DIR", dest="run_dir", help="a run: its base and its newest adapter")
    which.add_argument("--model", metavar="DIR", help="a checkpoint directory, with --adapter")
    parser.add_argument("--adapter", metavar="DIR", help="a PEFT adapter, kjax's or another's; with --run one of its "
                        "checkpoints/STEP/adapter instead of the newest")


def _replies(parser: argparse.ArgumentParser):
    """How replies are made."""
    parser.add_argument("--max_new_tokens", type=_positive, default=512, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0: the likeliest token (default)")
    parser.add_argument("--top_p", type=float, default=1.0, metavar="X")
    parser.add_argument("--thinking", action=argparse.BooleanOptionalAction, help="whether replies may reason first; "
                        "default: as the chat template has it")
    parser.add_argument("--seed", type=int, default=0, metavar="N")


def _judged(parser: argparse.ArgumentParser):
    """Which model with which adapter, on which rows."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", metavar="DIR", dest="run_dir", help="a run: its newest adapter, on its evaluation "
                       "rows")
    which.add_argument("--model", metavar="DIR", help="a checkpoint directory")
    parser.add_argument("--adapter", metavar="DIR", help="a PEFT adapter for --model; with --run one of its "
                        "checkpoints/STEP/adapter instead of the newest")
    parser.add_argument("--base", action="store_true", help="leave the adapter off, to compare")
    parser.add_argument("--dataset", metavar="FILE", help="rows to judge on, instead of the run's")


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be positive")
    return value


def _not_negative(text: str) -> float:
    if not (value := float(text)) >= 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return value
