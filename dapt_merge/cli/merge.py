"""`dapt-merge merge`: a recipe, or a few flags, to a merged checkpoint on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from dapt_merge.merging.report import MergeReport
    from dapt_merge.merging.verification import Verification
    from dapt_merge.recipe import NamedRecipe


def merge(
    arguments: list[str] = typer.Argument(
        None,
        metavar="[RECIPE.yaml] [KEY=VALUE]",
        help="A recipe file, then overrides such as t=0.3.",
        show_default=False,
    ),
    out: Path = typer.Option(None, "--out", "-o", help="The folder to write the merged model to.", show_default=False),
    base: str = typer.Option(None, help="Instead of a recipe: the base model (folder or hub id)."),
    dapt: list[str] = typer.Option(None, help="With --base: a DAPT checkpoint; repeat for more.", show_default=False),
    method: str = typer.Option(None, help="With --base: linear, slerp, ties, …"),
    weight: list[float] = typer.Option(
        None,
        help="With --base: the weight of the DAPT checkpoint (t for slerp); repeat to give one each.",
        show_default=False,
    ),
    density: list[float] = typer.Option(
        None,
        help="With --base: the share of each difference that is kept; repeat to give one each.",
        show_default=False,
    ),
    engine: str = typer.Option(
        "native", help="native, or mergekit: the same recipe carried out by mergekit's own code."
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace OUT if it exists."),
    threads: int = typer.Option(None, min=1, help="Tensors merged at once.", show_default="the CPUs there are"),
    device: str = typer.Option("cpu", help="Where to compute: cpu, or cuda (the processor where there is none)."),
    flush: bool = typer.Option(
        False,
        "--flush/--no-flush",
        help="Wait until the disk has everything. Without, the kernel writes the rest within half a minute, as after "
        "cp: only a power cut in that time can take the output away. One that replaces another is waited for.",
    ),
    verify: Path = typer.Option(
        None,
        metavar="OUT",
        help="Write nothing: recompute OUT from its report and compare bit for bit. INPUT=PATH for inputs that moved.",
        show_default=False,
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the merge report as JSON on stdout."),
) -> None:
    """Merge a base model and its DAPT checkpoints into an ordinary checkpoint.

    A file with several recipes (YAML documents, each with a name: that others use as a model) is merged in order.

    dapt-merge merge RECIPE.yaml -o OUT t=0.3

    dapt-merge merge --base BASE --dapt DAPT --method ties --weight 0.6 --density 0.3 -o OUT lambda=0.9

    dapt-merge merge --verify OUT
    """
    from dapt_merge.atomic import refuse_existing
    from dapt_merge.cli.console import console, output, print_json, progress

    if verify is not None:
        others = {"--out": out, "--base": base, "--dapt": dapt, "--method": method, "--overwrite": overwrite}
        _verify(verify, arguments or [], [name for name, value in others.items() if value], threads, as_json)
        return
    if out is None:
        _refuse_without_output()
    with _uncollected():
        chain = _recipes(arguments or [], base, dapt or [], method, {"weight": weight, "density": density})
        refuse_existing(out, overwrite)
        if _checked_engine(engine, threads, device) == "mergekit":
            _by_mergekit(chain, out, overwrite, as_json)
            return

        from dapt_merge.merging.chain import merge_chain

        shown: list[str] = []

        def tell(warnings: Iterable[str], name: str | None) -> None:
            for warning in warnings:
                if warning not in shown:
                    shown.append(warning)
                    whose = "" if name is None else f"{name}: "
                    console.print(f"[yellow]warning:[/] {_escaped(whose + warning)}", soft_wrap=True)

        _tell_of_compiling(chain)
        with progress("merging", "elements") as on_progress:
            report = merge_chain(
                chain,
                out,
                overwrite=overwrite,
                threads=threads,
                measure_copy=True,
                device=device,
                flush=flush,
                on_warnings=tell,
                on_progress=on_progress,
            )
    if as_json:
        print_json(report.to_dict())
    else:
        for line in _summary(report, out):
            output.print(_escaped(line), soft_wrap=True)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Search for no garbage: what is made while the libraries load stays, and a merge makes next to none."""
    import gc

    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # or the first search to come would go through all that the libraries made
        gc.enable()


def _tell_of_compiling(chain: list[NamedRecipe]) -> None:
    """Say why the first merge after an installation takes longer, where a method has compiled loops."""
    from dapt_merge.cli.console import console
    from dapt_merge.methods.compiling import tell_of_compiling
    from dapt_merge.methods.registry import get_method, method_names

    names = {step.recipe.merge_method for step in chain}.intersection(method_names())
    if any(get_method(name).kernel is not None for name in names):
        sentence = "compiling the loops of this method for this machine; that happens once, and is kept"
        tell_of_compiling(lambda: console.print(sentence, soft_wrap=True))


def _checked_engine(engine: str, threads: int | None, device: str) -> str:
    from dapt_merge.errors import InputError, nearest

    if engine not in ("native", "mergekit"):
        raise InputError(
            f"there is no engine '{engine}'.{nearest(engine, ['native', 'mergekit'])}",
            where="--engine",
            remedy="Use native or mergekit.",
        )
    if engine == "mergekit" and threads is not None:
        raise InputError(
            "mergekit chooses its threads itself",
            where="--threads",
            remedy="Leave --threads out with --engine mergekit.",
        )
    if engine == "mergekit" and device != "cpu":
        raise InputError(
            "mergekit is run on the processor",
            where="--device",
            remedy="Leave --device out with --engine mergekit.",
        )
    return engine


def _by_mergekit(chain: list[NamedRecipe], out: Path, overwrite: bool, as_json: bool) -> None:
    from dapt_merge.cli.console import console, output, print_json
    from dapt_merge.merging.chain import merge_chain

    with console.status("merging with mergekit"):
        report = merge_chain(chain, out, engine="mergekit", overwrite=overwrite)
    if as_json:
        print_json(report.to_dict())
        return
    output.print(_escaped(f"{out}: written by mergekit"), soft_wrap=True)
    output.print(_escaped(f"recipe and report: {out / 'recipe.yaml'}, {out / 'merge_report.json'}"), soft_wrap=True)


def _recipes(
    arguments: list[str], base: str | None, dapt: list[str], method: str | None, flags: dict[str, Any]
) -> list[NamedRecipe]:
    """Read the recipe file, or make the recipe that the flags describe; one of the two, never a mixture."""
    from dapt_merge.errors import InputError

    files = [argument for argument in arguments if _is_file_name(argument)]
    overrides = [argument for argument in arguments if not _is_file_name(argument)]
    remedy = "Give RECIPE.yaml, or --base, --dapt and --method; see dapt-merge merge --help."
    given = {name: value for name, value in flags.items() if value}
    if files:
        used = [f"--{name}" for name, value in {"base": base, "dapt": dapt, "method": method, **given}.items() if value]
        if len(files) > 1:
            raise InputError(f"more than one recipe was given: {', '.join(files)}", where="arguments", remedy=remedy)
        if used:
            raise InputError(
                f"{', '.join(used)} cannot be combined with a recipe file",
                where="arguments",
                remedy="Override the recipe with key=value instead, for example weight=0.6 or merge_method=ties.",
            )
        from dapt_merge.recipe import load_recipes

        return load_recipes(files[0], overrides)
    missing = [f"--{name}" for name, value in {"base": base, "dapt": dapt, "method": method}.items() if not value]
    if missing:
        what = "no recipe was given" if len(missing) == 3 else f"{', '.join(missing)} missing"
        raise InputError(what, where="arguments", remedy=remedy)
    from dapt_merge.recipe import NamedRecipe, make_recipe

    assert base is not None
    assert method is not None
    return [NamedRecipe(None, make_recipe(base, dapt, method, **_merged(given, overrides)))]


def _merged(given: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Join --weight, --density and key=value into the parameters of `make_recipe`."""
    from dapt_merge.errors import InputError
    from dapt_merge.yaml_files import parse_override

    parameters = {name: value[0] if len(value) == 1 else value for name, value in given.items()}
    dotted = []
    for text in overrides:
        name, value = parse_override(text)
        if "." in name:
            dotted.append(text)
            continue
        if name in ("base", "dapt", "method", "overrides"):
            raise InputError(f"'{name}' is no parameter", where="arguments", remedy=f"Give --{name} VALUE instead.")
        if name in parameters:
            raise InputError(
                f"'{name}' is given twice", where="arguments", remedy=f"Give --{name} or {name}=…, not both."
            )
        parameters[name] = value
    return {**parameters, "overrides": dotted}


def _is_file_name(argument: str) -> bool:
    return "=" not in argument or Path(argument).is_file()


def _refuse_without_output() -> None:
    from dapt_merge.errors import InputError

    raise InputError("no output was given", where="arguments", remedy="Add -o FOLDER for the merged model.")


def _verify(out: Path, located: list[str], others: list[str], threads: int | None, as_json: bool) -> None:
    """Exit with 0 when a recomputation gives the same bits, with 1 when it does not."""
    from dapt_merge.cli.console import output, print_json, progress
    from dapt_merge.errors import InputError
    from dapt_merge.merging.verification import verify_merge

    wrong = [argument for argument in located if "=" not in argument]
    if others or wrong:
        raise InputError(
            f"{', '.join([*others, *wrong])} cannot be combined with --verify",
            where="arguments",
            remedy="The recipe is read from the output's own report; give only INPUT=PATH for inputs that moved.",
        )
    places = dict(argument.partition("=")[::2] for argument in located)
    with progress("verifying", "elements") as on_progress:
        found = verify_merge(out, located=places, threads=threads, on_progress=on_progress)
    if as_json:
        print_json(found.to_dict())
    else:
        for line in _verdict(found, out):
            output.print(_escaped(line), soft_wrap=True)
    if not found.same:
        raise typer.Exit(1)


def _verdict(found: Verification, out: Path) -> list[str]:
    again = "" if found.engine == "native" else f" (computed again by {found.engine})"
    if found.same:
        return [f"{out}: {found.tensors:,} tensors, the same bit for bit{again}"]
    lines = [
        f"{out}: {len(found.differing):,} tensors differ from what was computed again, of {found.tensors:,}{again}"
    ]
    lines += [f"{name}: {fault}" for name, fault in (*found.differing.items(), *found.files.items())]
    if not found.differing:
        return lines
    if found.changed_afterwards:
        return [*lines, "The stored tensors are not those that the merge wrote: they were changed afterwards."]
    lines.append("The stored tensors are those that the merge wrote: it is this machine that computes otherwise.")
    return lines + [f"{name} was {then} and is {now}" for name, (then, now) in found.other_versions.items()]


def _summary(report: MergeReport, out: Path) -> list[str]:
    """Say in a few lines what was written, what was not as asked for, and what it cost."""
    lines = [f"{out}: {report.tensors:,} tensors, {_gigabytes(report.bytes_written)}"]
    if report.fallbacks:
        lines.append(f"fallbacks: {report.fallbacks:,} of {report.tensors:,} tensors ({_kinds_of_fallback(report)})")
    if report.lost_share is not None:
        lines.append(f"rounding: {report.lost_share:.1%} of {report.updated_elements:,} updated elements fell back")
    lines.append(_speed(report))
    lines.append(f"recipe and report: {out / 'recipe.yaml'}, {out / 'merge_report.json'}")
    return lines


def _speed(report: MergeReport) -> str:
    moved = f"read {_gigabytes(report.bytes_read)}, wrote {_gigabytes(report.bytes_written)}"
    if report.resumed_tensors:
        return f"{moved}: {report.resumed_tensors:,} tensors by an interrupted run, the rest in {report.seconds:.1f} s"
    seconds = max(report.seconds, 1e-9)
    rate = f"{_gigabytes((report.bytes_read + report.bytes_written) / seconds)}/s"
    if report.copy_seconds is not None:
        share = report.copy_seconds / seconds
        rate += f", {share:.0%} of the speed" if share < 0.95 else ", the speed"
        rate += " of copying the same bytes here"
    return f"{moved} in {report.seconds:.1f} s ({rate})"


def _kinds_of_fallback(report: MergeReport) -> str:
    """Name what the method did instead, without the numbers that differ from tensor to tensor."""
    fallbacks = [str(notes["fallback"]) for notes in report.notes.values() if "fallback" in notes]
    return ", ".join(sorted({text.split(":")[0] for text in fallbacks}))


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
