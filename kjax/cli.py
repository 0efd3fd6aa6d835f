"""The command `kjax`: each verb a few lines over the library, which is imported when its verb runs."""

import json
import os
import sys
import warnings
from collections.abc import Sequence

from kjax import arguments
from kjax.errors import KjaxError

EXIT_WRONG = 2  # settings, files or a plan that does not fit: something the user can mend
EXIT_SIGINT = 130  # 128 + SIGINT, as shells count


def gin_bindings(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is left of a command line, and NAME=VALUE of each --gin.NAME=VALUE in it."""
    bindings = [arg.removeprefix("--gin.") for arg in argv if arg.startswith("--gin.")]
    return [arg for arg in argv if not arg.startswith("--gin.")], bindings


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code. KJAX_DEBUG=1 shows the traceback of an error."""
    argv, bindings = gin_bindings(sys.argv[1:] if argv is None else argv)
    parser = arguments.parser()
    args = parser.parse_args(argv)
    if bindings and not hasattr(args, "gin_file"):
        parser.error(f"--gin.{bindings[0]}: {args.command} takes no gin settings")
    args.bindings = bindings
    debug = os.environ.get("KJAX_DEBUG") == "1"
    with warnings.catch_warnings():
        if not debug:
            warnings.showwarning = _show_warning
        try:
            code = VERBS[args.verb](args)
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


def _sampling(args) -> dict:
    return {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p", "seed", "thinking")}


def _judged_settings(args):
    from kjax import judged
    of, directory = (judged.of_run, args.run_dir) if args.run_dir else (judged.of_model, args.model)
    return of(directory, args.gin_file, args.bindings, args.base, args.adapter, args.dataset)


def _model_and_adapter(args) -> tuple[str, str | os.PathLike]:
    if args.run_dir:
        from kjax import run
        config, adapter = run.settings(args.run_dir)
        return config.model.directory, args.adapter or adapter
    if not args.adapter:
        raise KjaxError("--model needs --adapter DIR, the adapter to put on it; a run has its own (--run)")
    return args.model, args.adapter


def _train(args) -> int:
    from kjax import gin_config
    config = gin_config.load(args.gin_file, args.bindings)
    from kjax.train import train
    run = train(config, resume=args.resume, overwrite=args.overwrite)
    print(run)
    return run.exit_code


def _chat(args) -> int:
    from kjax import chat, run
    directory, adapter = args.model, args.adapter
    dtype, experts, weights = args.dtype or "bfloat16", args.experts or "host", args.weights or "full"
    if args.run_dir:
        if adapter:
            raise KjaxError("--adapter goes with --model: --run has its own")
        config, adapter = run.settings(args.run_dir)
        directory = config.model.directory
        dtype, experts = args.dtype or config.model.dtype, args.experts or config.model.experts
        weights = args.weights or config.model.weights
    from kjax.load import load
    model = load(directory, adapter=adapter, dtype=dtype, experts=experts, weights=weights)

    def generate(messages, stream):
        return model.generate(messages, stream=stream, **_sampling(args))

    messages = [{"role": "system", "content": args.system}] if args.system else []
    try:
        if args.message is not None:
            chat.reply(generate, [*messages, {"role": "user", "content": args.message}], sys.stdout)
        else:
            chat.converse(generate, messages, sys.stdin, sys.stdout)
    finally:
        model.close()
    return 0


def _eval(args) -> int:
    config = _judged_settings(args)
    from rich import print as show

    from kjax.evaluate import evaluate
    found = evaluate(config, console=_progress_console())
    if args.json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        show(found)
    return 0


def _predict(args) -> int:
    config = _judged_settings(args)
    from rich import print as show

    from kjax.predict import predict
    try:
        found = predict(config, args.out, batch=args.batch, score=args.score, overwrite=args.overwrite,
                        console=_progress_console(), **_sampling(args))
    except KeyboardInterrupt:
        print(f"replies so far are in {args.out}; the same command goes on from there", file=sys.stderr)
        raise
    show(found)
    print(found.directory)
    return 0


def _progress_console():
    """Progress goes to standard error: what a verb prints may be read by a program."""
    from rich.console import Console
    return Console(stderr=True)


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


VERBS = {"train": _train, "eval": _eval, "predict": _predict, "chat": _chat, "data show": _data_show,
         "config show": _config_show, "plan": _plan, "export": _export, "merge": _merge, "quantize": _quantize,
         "env": _env}
