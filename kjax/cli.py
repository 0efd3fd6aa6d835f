"""The command `kjax`: each verb a few lines over the library, which is imported when its verb runs."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence

from kjax.errors import KjaxError

EXIT_WRONG = 2  # settings, files or a plan that does not fit: something the user can mend
EXIT_SIGINT = 130  # 128 + SIGINT, as shells count

GIN_HELP = "--gin.NAME=VALUE (repeatable) binds a setting (Lora.rank) or a macro (RANK) after the files"

AGAIN = "after an interruption the same command goes on from DIR.partial"


def gin_bindings(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is left of a command line, and NAME=VALUE of each --gin.NAME=VALUE in it."""
    bindings = [arg.removeprefix("--gin.") for arg in argv if arg.startswith("--gin.")]
    return [arg for arg in argv if not arg.startswith("--gin.")], bindings


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code. KJAX_DEBUG=1 shows the traceback of an error."""
    argv, bindings = gin_bindings(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    args = parser.parse_args(argv)
    if bindings and not hasattr(args, "gin_file"):
        parser.error(f"--gin.{bindings[0]}: {args.command} takes no gin settings")
    args.bindings = bindings
    debug = os.environ.get("KJAX_DEBUG") == "1"
    with warnings.catch_warnings():
        if not debug:
            warnings.showwarning = _show_warning
        try:
            code = args.run(args)
            sys.stdout.flush()
            return code
        except KjaxError as error:
            if debug:
                raise
            print(f"kjax: error: {error}", file=sys.stderr)
            return EXIT_WRONG
        except KeyboardInterrupt:
            print("kjax: interrupted", file=sys.stderr)
            return EXIT_SIGINT
        except BrokenPipeError:  # `kjax env | head`: the reader left, which is no error
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0


def _show_warning(message, category, filename, lineno, file=None, line=None):
    print(f"kjax: warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kjax", description="LoRA fine-tuning of very large mixture-of-experts "
                                     "models on one workstation.", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="command", metavar="VERB", required=True)

    train = _verb(verbs, "train", _train, "fine-tune a model", gin=True)
    after = train.add_mutually_exclusive_group()
    after.add_argument("--resume", nargs="?", const=True, default=False, choices=("changed",),
                       help="go on from the last checkpoint of Train.run_dir; `--resume changed` does so although "
                       "data, base or a binding setting differ")
    after.add_argument("--overwrite", action="store_true", help="replace the run in Train.run_dir")

    chat = _verb(verbs, "chat", _chat, "talk to a model, with or without an adapter")
    which = chat.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="DIR", help="a checkpoint directory")
    which.add_argument("--run", metavar="DIR", dest="run_dir", help="a run: its base with its newest adapter")
    chat.add_argument("--adapter", metavar="DIR", help="a PEFT adapter for --model")
    chat.add_argument("--message", metavar="TEXT", help="print one reply and end")
    chat.add_argument("--system", metavar="TEXT", help="the system message")
    chat.add_argument("--max_new_tokens", type=_positive, default=512, metavar="N")
    chat.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0: the likeliest token (default)")
    chat.add_argument("--top_p", type=float, default=1.0, metavar="X")
    chat.add_argument("--thinking", action=argparse.BooleanOptionalAction, help="whether replies may reason first; "
                      "default: as the chat template has it")
    chat.add_argument("--seed", type=int, default=0, metavar="N")
    chat.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: the run's, else bfloat16")
    chat.add_argument("--experts", choices=("host", "device"), help="default: the run's, else host")
    chat.add_argument("--weights", choices=("full", "8bit", "nf4", "int4"), help="default: the run's, else full")

    data = verbs.add_parser("data", help="look at a dataset").add_subparsers(dest="what", metavar="VERB", required=True)
    show = _verb(data, "show", _data_show, "print rendered rows with the trained tokens coloured", gin=True)
    show.add_argument("--model", metavar="DIR", help="sets Model.directory: whose tokenizer and template")
    show.add_argument("--dataset", metavar="FILE", help="sets Data.dataset")
    show.add_argument("--rows", type=_positive, default=3, metavar="N")

    config = verbs.add_parser("config", help="look at settings").add_subparsers(
        dest="what", metavar="VERB", required=True)
    _verb(config, "show", _config_show, "print every setting and where it comes from", gin=True)

    plan = _verb(verbs, "plan", _plan, "memory, work and time of a run, from config.json alone", gin=True)
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

    export = _verb(verbs, "export", _export, "write an adapter as PEFT files for other programs",
                   example="kjax export --run runs/first --out adapter --dtype bfloat16")
    _adapted(export)
    export.add_argument("--out", metavar="DIR", required=True, help="a new directory")
    export.add_argument("--layout", choices=("experts", "fused"), default="experts", help="of routed experts: "
                        "tensors for each expert (default), or fused as peft does with transformers 5")
    export.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    export.add_argument("--base_name", metavar="NAME", help="what to record as the base, for instance its hub name")

    merge = _verb(verbs, "merge", _merge, "write a checkpoint with an adapter merged into it, in the base's format",
                  example="kjax merge --run runs/first --out DeepSeek-V3-mine")
    _adapted(merge)
    merge.add_argument("--out", metavar="DIR", required=True, help=f"a new directory; {AGAIN}")
    merge.add_argument("--rounding", choices=("stochastic", "nearest"), default="stochastic", help="of quantised "
                       "weights: right on average (default), or to nearest, which loses changes below half a step")

    quantize = _verb(verbs, "quantize", _quantize, "write a checkpoint whose routed experts have 8 or 4 bits",
                     example="kjax quantize --model DeepSeek-V3 --format int4 --out DeepSeek-V3-int4")
    quantize.add_argument("--model", metavar="DIR", required=True, help="a checkpoint in bf16 or FP8; never changed")
    quantize.add_argument("--format", required=True, choices=("int8", "int4"),
                          help="int8: groups of 128; int4: groups of 32, the layout of Kimi-K2-Thinking")
    quantize.add_argument("--out", metavar="DIR", required=True, help=f"a new directory; {AGAIN}")

    env = _verb(verbs, "env", _env, "this machine and installation: versions, kernels, memory, GPU")
    env.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _verb(verbs, name: str, run, text: str, gin: bool = False, example: str = "") -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".",
                              epilog=GIN_HELP if gin else f"example: {example}" if example else None,
                              allow_abbrev=False)
    parser.set_defaults(run=run)
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


def _model_and_adapter(args) -> tuple[str, str | os.PathLike]:
    if args.run_dir:
        from kjax import chat
        config, adapter = chat.run_settings(args.run_dir)
        return config.model.directory, args.adapter or adapter
    if not args.adapter:
        raise KjaxError("--model needs --adapter DIR, the adapter to put on it; a run has its own (--run)")
    return args.model, args.adapter


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be positive")
    return value


def _not_negative(text: str) -> float:
    if not (value := float(text)) >= 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return value


def _train(args) -> int:
    from kjax import gin_config
    config = gin_config.load(args.gin_file, args.bindings)
    from kjax.train import train
    run = train(config, resume=args.resume, overwrite=args.overwrite)
    print(run)
    return run.exit_code


def _chat(args) -> int:
    from kjax import chat
    directory, adapter = args.model, args.adapter
    dtype, experts, weights = args.dtype or "bfloat16", args.experts or "host", args.weights or "full"
    if args.run_dir:
        if adapter:
            raise KjaxError("--adapter goes with --model: --run has its own")
        config, adapter = chat.run_settings(args.run_dir)
        directory = config.model.directory
        dtype, experts = args.dtype or config.model.dtype, args.experts or config.model.experts
        weights = args.weights or config.model.weights
    from kjax.load import load
    model = load(directory, adapter=adapter, dtype=dtype, experts=experts, weights=weights)

    def generate(messages, stream):
        return model.generate(messages, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                              top_p=args.top_p, seed=args.seed, stream=stream, thinking=args.thinking)

    messages = [{"role": "system", "content": args.system}] if args.system else []
    try:
        if args.message is not None:
            chat.reply(generate, [*messages, {"role": "user", "content": args.message}], sys.stdout)
        else:
            chat.converse(generate, messages, sys.stdin, sys.stdout)
    finally:
        model.close()
    return 0


def _data_show(args) -> int:
    from kjax import gin_config
    named = {"Model.directory": args.model, "Data.dataset": args.dataset}
    bindings = [f"{key}={value!r}" for key, value in named.items() if value is not None] + args.bindings
    config = gin_config.load(args.gin_file, bindings, fallback={"Train.run_dir": "unused"})
    from kjax.data import show
    show.show(config, rows=args.rows)
    return 0


def _config_show(args) -> int:
    from kjax import gin_config
    resolved = gin_config.resolve(args.gin_file, args.bindings)
    print(gin_config.annotated(resolved), end="")
    return 0


def _plan(args) -> int:
    from kjax import gin_config
    bindings = ([f"Model.directory={args.model!r}"] if args.model else []) + args.bindings
    config = gin_config.load(args.gin_file, bindings, fallback={"Data.dataset": "unused", "Train.run_dir": "unused"})
    from kjax import plan
    scaled = {"host_peak": args.host_tflops and args.host_tflops * 1e12,
              "host_bandwidth": args.host_gbs and args.host_gbs * 1e9,
              "device_peak": args.device_tflops and args.device_tflops * 1e12,
              "device_bandwidth": args.device_gbs and args.device_gbs * 1e9, "pcie": args.pcie_gbs and
              args.pcie_gbs * 1e9}
    result = plan.plan(config, plan.machine(args.machine, args.host_gb, args.device_gb, **scaled))
    if args.json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        result.print()
    return 0 if result.fits else EXIT_WRONG


def _export(args) -> int:
    from kjax.export import export
    print(export(*_model_and_adapter(args), args.out, layout=args.layout, dtype=args.dtype, base_name=args.base_name))
    return 0


def _merge(args) -> int:
    from kjax.merge import merge
    print(merge(*_model_and_adapter(args), args.out, rounding=args.rounding))
    return 0


def _quantize(args) -> int:
    from kjax.quantize import quantize
    print(quantize(args.model, args.out, args.format))
    return 0


def _env(args) -> int:
    from kjax import env
    facts = env.report()
    print(json.dumps(facts, indent=2) if args.json else env.text(facts))
    return 0
