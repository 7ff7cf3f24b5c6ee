"""A pipeline's own ``__call__``, cut at its denoising loop.

``__call__`` of a diffusers pipeline is a prologue (encode the prompt, shape the noise, make the timesteps), one loop
``for i, t in enumerate(timesteps)`` around ``scheduler.step``, and an epilogue (decode). ``lift`` compiles these three
as functions of their own; every statement stays the pipeline's:

- ``prologue(self, **call_kwargs)`` runs up to the loop and returns its local variables, what the loop iterates over, and what
  each loop around it iterates over.
- ``body(item, *, self, **locals)`` is one pass of the loop, as a generator: it yields the arguments that
  ``scheduler.step`` would have got, is sent what the step answered, and returns its local variables.
- ``epilogue(*, self, **locals)`` is everything after the loop and returns what ``__call__`` returns.

Decorators such as ``torch.no_grad`` are left behind. File name and line numbers are kept, so a traceback points into
the pipeline's file. A loop around the denoising loop (FreeInit, a video made section by section) is passed through once;
the caller sees what it iterates over, and must refuse more than one pass. What is left out: loops in a helper method, and
iterations whose second step depends on the result of the first.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

ADAPTER_ADVICE = "write an adapter for it and name it as `model.adapter` (an example: examples/pipeline_adapter)"
_CALLBACKS = ("callback", "callback_on_step_end")  # never given by us, so None


class LiftError(ValueError):
    """A pipeline whose ``__call__`` cannot be cut at one denoising loop; the message names the class and the loops."""


@dataclass(frozen=True, kw_only=True)
class Lifted:
    """The three parts of a pipeline's ``__call__``, and the names that connect them."""

    cls: type
    prologue: Callable[..., tuple[dict[str, Any], Any, tuple[Any, ...]]]
    body: Callable[..., Any]
    epilogue: Callable[..., Any]
    # the locals that go into a ``scheduler.step`` and come out of it: latents, perhaps sound, too
    states: tuple[str, ...]
    whole: bool  # each step gets its local as it is; otherwise a part of it, and what follows the step puts it back
    outer: tuple[str, ...]  # the first line of each loop around the denoising loop, with its number
    body_reads: frozenset[str]  # locals of the prologue that the body may read, without ``self``
    epilogue_reads: frozenset[str]
    written_in_place: frozenset[str]  # locals that the body changes in place: hand it copies
    writes: frozenset[str]  # locals that the body assigns
    attributes: frozenset[str]  # X of every ``self.X`` that the body calls or passes on: its networks are among them
    bars: frozenset[str]  # progress bars
    tail_is_idle: bool  # True where nothing that matters follows the step within an iteration
    source: str  # the loop as it stands in the pipeline's file

    @property
    def ends_at_step(self) -> bool:
        """Whether an iteration does nothing to the next latents after its step."""
        return self.tail_is_idle or not self.whole


@functools.cache
def lift(cls: type) -> Lifted:
    """Cut ``cls.__call__`` into prologue, loop body and epilogue.

    Raises LiftError where it has no loop around ``scheduler.step``, or several of them.
    """
    function = inspect.unwrap(cls.__call__)
    if not inspect.isfunction(function):
        raise LiftError(f"{cls.__name__} has no __call__ written in Python; {ADAPTER_ADVICE}")
    lines, definition = _definition(cls, function)
    loop, outer = _denoising_loop(cls, definition)
    steps = [node for node in ast.walk(loop) if _is_step(node)]
    after_loop = _after(cls, definition.body, loop)
    local_names = set(function.__code__.co_varnames + function.__code__.co_cellvars) - {"self"}
    bound_before = {arg.arg for arg in ast.walk(definition.args) if isinstance(arg, ast.arg)}
    bound_before |= {name.id for name in ast.walk(definition) if _is_stored(name) and name.lineno < loop.lineno}
    states, whole = _states(cls, loop, steps, bound_before & local_names)
    body_reads = (_loads(loop.body) & local_names) - (_stores([loop]) - bound_before)
    epilogue_reads = _loads(after_loop) & local_names

    prologue = copy.deepcopy(definition)
    _replace(prologue, loop, outer)
    body = [_YieldSteps().visit(copy.deepcopy(statement)) for statement in loop.body]
    one_pass = ast.For(target=loop.target, iter=ast.parse("(_item,)", mode="eval").body, body=body, orelse=[])
    body = [ast.copy_location(one_pass, loop), *ast.parse("return locals()").body]
    body_function = _function(f"{cls.__name__}_loop", _signature("_item", body_reads), body, loop)
    epilogue_function = _function(f"{cls.__name__}_epilogue", _signature(None, epilogue_reads), after_loop, loop)
    bars = {name.id for node in ast.walk(definition) for name in _bound_by_with(node)}
    settled = functools.partial(_settled, function=function, hidden=local_names - set(_CALLBACKS))
    return Lifted(
        cls=cls,
        prologue=_compile(prologue, function),
        body=_compile(body_function, function),
        epilogue=_compile(epilogue_function, function),
        states=states,
        whole=whole,
        outer=tuple(_first_line(around) for around in outer),
        body_reads=frozenset(body_reads),
        epilogue_reads=frozenset(epilogue_reads),
        written_in_place=frozenset(_written_in_place(loop.body) & body_reads),
        writes=frozenset(_stores([loop])),
        attributes=frozenset(_bare_attributes(loop) | _aliases(definition, body_reads)),
        bars=frozenset(bars),
        tail_is_idle=all(_idle(_after(cls, loop.body, step), bars, settled) for step in steps),
        source=textwrap.dedent("".join(lines[loop.lineno - 1 : loop.end_lineno])),
    )


def show_loop(cls: type) -> str:
    """The lifted loop of a pipeline class, to be read: the pipeline's own source, under a few lines of explanation."""
    lifted = lift(cls)
    first = lifted.body.__code__.co_firstlineno
    names = textwrap.fill(", ".join(sorted(lifted.body_reads)), 110, initial_indent="#   ", subsequent_indent="#   ")
    return (
        f"# {lifted.body.__code__.co_filename}, from line {first}\n"
        f"# One pass of this loop is a function of one item, the latents ({', '.join(lifted.states)}) and these locals from "
        "before:\n"
        f"{names}\n"
        "# scheduler.step(...) is not called: what it would get is handed out, and the next latents are put in its place.\n"
        f"{lifted.source}"
    )


# --- the surgery ---


def _definition(cls: type, function: Callable) -> tuple[list[str], ast.FunctionDef]:
    """The lines of a function's file and its syntax tree, so that line numbers and columns are the file's."""
    try:
        lines, _ = inspect.findsource(function)
    except OSError as error:
        raise LiftError(
            f"{cls.__name__}.__call__ has no source file to read ({error}); define the class in a file"
        ) from error
    for node in ast.walk(ast.parse("".join(lines))):
        if isinstance(node, ast.FunctionDef) and node.name == function.__name__:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if first == function.__code__.co_firstlineno:
                node.decorator_list = []
                return lines, node
    raise LiftError(f"{cls.__name__}.__call__ was not found in its source file; was the file changed after the import?")


class _YieldSteps(ast.NodeTransformer):
    """``scheduler.step(a, b, **c)`` becomes ``(yield ((a, b), {**c}))``."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if not _is_step(node):
            return node
        keywords = ast.Dict(keys=[], values=[keyword.value for keyword in node.keywords])
        keywords.keys = [None if keyword.arg is None else ast.Constant(keyword.arg) for keyword in node.keywords]
        handed_out = ast.Tuple(elts=[ast.Tuple(elts=node.args, ctx=ast.Load()), keywords], ctx=ast.Load())
        return ast.copy_location(ast.Yield(value=handed_out), node)


def _replace(definition: ast.FunctionDef, loop: ast.For, outer: list[ast.For]) -> None:
    """Put ``return locals(), ITERABLE, (OUTER ITERABLES,)`` where the loop stands.

    What follows is never reached, but locals stay locals.
    """
    leave = ast.parse("return locals(), None, ()").body[0]
    around = ast.Tuple(elts=[copy.deepcopy(other.iter) for other in outer], ctx=ast.Load())
    leave.value.elts[1:] = [loop.iter, around]  # type: ignore[attr-defined]
    for node in ast.walk(definition):
        for block in (getattr(node, field, None) for field in ("body", "orelse", "finalbody")):
            if isinstance(block, list):
                for place, statement in enumerate(block):
                    if isinstance(statement, ast.For) and statement.lineno == loop.lineno:
                        block[place] = ast.copy_location(leave, loop)


def _function(name: str, args: ast.arguments, body: list[ast.stmt], where: ast.stmt) -> ast.FunctionDef:
    made = ast.parse(f"def {name}(): pass").body[0]
    assert isinstance(made, ast.FunctionDef)
    made.args, made.body = args, body
    return ast.copy_location(made, where)


def _signature(item: str | None, names: set[str]) -> ast.arguments:
    """``(item, *, self, a=None, b=None)``; None is for what the prologue bound in one branch only."""
    optional = ", ".join(f"{name}=None" for name in sorted(names))
    text = f"def f({item + ', ' if item else ''}*, self{', ' + optional if optional else ''}): pass"
    return ast.parse(text).body[0].args  # type: ignore[attr-defined]


def _compile(definition: ast.FunctionDef, like: Callable) -> Callable:
    module = ast.fix_missing_locations(ast.Module(body=[definition], type_ignores=[]))
    made: dict[str, Callable] = {}
    exec(compile(module, like.__code__.co_filename, "exec"), like.__globals__, made)
    return made[definition.name]


# --- finding things ---


def _is_step(node: ast.AST) -> TypeGuard[ast.Call]:
    """``scheduler.step(...)``, ``self.scheduler.step(...)``, ``audio_scheduler.step(...)``."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "step"
        and ast.unparse(node.func.value).endswith("scheduler")
    )


def _has_step(node: ast.AST) -> bool:
    return any(_is_step(inner) for inner in ast.walk(node))


def _denoising_loop(cls: type, definition: ast.FunctionDef) -> tuple[ast.For, list[ast.For]]:
    """The innermost ``for`` around the step, exactly one of which must exist, and the loops around it from outside in."""
    loops = [node for node in ast.walk(definition) if isinstance(node, (ast.For, ast.While)) and _has_step(node)]
    inner = [loop for loop in loops if not any(other is not loop and other in ast.walk(loop) for other in loops)]
    lines = ", ".join(map(_first_line, loops))
    if not loops:
        helpers = [name for name in _methods_with_a_step(cls) if name != "__call__"]
        where = f"; it steps in {', '.join(helpers)}" if helpers else ""
        raise LiftError(f"{cls.__name__}.__call__ has no loop around scheduler.step{where}; {ADAPTER_ADVICE}")
    if len(inner) > 1:
        raise LiftError(
            f"{cls.__name__}.__call__ has {len(inner)} denoising loops: {lines}; one is needed; {ADAPTER_ADVICE}"
        )
    around = [loop for loop in loops if loop is not inner[0]]  # ast.walk goes from outside in
    if not all(isinstance(loop, ast.For) for loop in loops):
        raise LiftError(f"{cls.__name__}.__call__ denoises in a while loop: {lines}; {ADAPTER_ADVICE}")
    return inner[0], around  # type: ignore[return-value]


def _first_line(loop: ast.stmt) -> str:
    return f"line {loop.lineno} ({ast.unparse(loop).splitlines()[0]})"


def _methods_with_a_step(cls: type) -> Iterator[str]:
    for name, method in inspect.getmembers(cls, inspect.isfunction):
        if ".step(" in inspect.getsource(inspect.unwrap(method)):
            yield name


def _states(cls: type, loop: ast.For, steps: list[ast.Call], before: set[str]) -> tuple[tuple[str, ...], bool]:
    """The locals whose values go into a step and come out of it, as ``latents = scheduler.step(noise, t, latents)[0]``.

    Steps of one name are branches of one step. Where a step has no such local, it is the name in the third argument,
    ``scheduler.step(model_output, timestep, sample)``; where it has several (a solver's memory), it is that of another step.
    A name that the loop itself takes from a local of before (``part = latents[:, 1:]``) stands for that local.

    Also returned: whether every step gets its local as it is, and not a part of it.
    """
    found, whole = [], True  # for each step, the names that may be its sample
    for step in steps:
        assigned = [node for node in ast.walk(loop) if isinstance(node, ast.Assign) and step in ast.walk(node.value)]
        targets = {name.id for node in assigned for name in _names(node.targets)}
        arguments = [*step.args, *(keyword.value for keyword in step.keywords)]
        both = targets & {root for argument in arguments if (root := _root(argument))}
        third = {root for argument in step.args[2:3] if (root := _root(argument))}
        names = both or third
        if not names:
            raise LiftError(f"{cls.__name__}: the sample of {ast.unparse(step)} (line {step.lineno}) was not found")
        found.append({_taken_from(name, loop, before) for name in names})
        whole = whole and names <= before and any(isinstance(a, ast.Name) and a.id in names for a in arguments)
    certain = {name for names in found if len(names) == 1 for name in names}
    chosen = []
    for step, names in zip(steps, found):
        own = names if len(names) == 1 else names & certain
        if len(own) != 1:
            raise LiftError(
                f"{cls.__name__}: {ast.unparse(step)} (line {step.lineno}) may step any of {', '.join(sorted(names))}; "
                f"{ADAPTER_ADVICE}"
            )
        chosen += own
    return tuple(dict.fromkeys(chosen)), whole


def _root(expression: ast.expr) -> str | None:
    """``latents`` of ``latents``, ``latents[:, 1:]`` and ``latents.float()``."""
    while not isinstance(expression, ast.Name):
        if isinstance(expression, (ast.Subscript, ast.Attribute)):
            expression = expression.value
        elif isinstance(expression, ast.Call):
            expression = expression.func
        else:
            return None
    return expression.id


def _taken_from(name: str, loop: ast.For, before: set[str]) -> str:
    """The local of before that the loop takes a part of under another name; the name itself where it is one, or none is."""
    if name in before:
        return name
    assigns = [node for node in ast.walk(loop) if isinstance(node, ast.Assign)]
    for node in assigns:
        if any(isinstance(target, ast.Name) and target.id == name for target in node.targets):
            root = _root(node.value)
            if root in before:
                return root
    return name


def _names(nodes: list[ast.expr]) -> list[ast.Name]:
    return [name for node in nodes for name in ast.walk(node) if isinstance(name, ast.Name)]


def _after(cls: type, block: list[ast.stmt], node: ast.AST) -> list[ast.stmt]:
    """The statements that run after ``node``, which is somewhere in ``block``."""
    for place, statement in enumerate(block):
        if statement is node:
            return block[place + 1 :]
        if any(inner is node for inner in ast.walk(statement)):
            blocks = [getattr(statement, field, []) for field in ("body", "orelse", "finalbody")]
            within = next((b for b in blocks if any(node in ast.walk(s) for s in b)), None)
            return (_after(cls, within, node) if within else []) + block[place + 1 :]
    raise LiftError(f"{cls.__name__}: the statements after line {getattr(node, 'lineno', '?')} were not found")


def _loads(block: list[ast.stmt]) -> set[str]:
    """Names that are read: ``x`` and the ``x`` of ``x += 1``."""
    nodes = [node for statement in block for node in ast.walk(statement)]
    plain = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return plain | {
        node.target.id for node in nodes if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name)
    }


def _written_in_place(block: list[ast.stmt]) -> set[str]:
    """``x`` of ``x[...] = y`` and of ``x += y``."""
    found = set()
    for node in (node for statement in block for node in ast.walk(statement)):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            found.add(node.value.id)
        if isinstance(node, ast.AugAssign):
            found |= {name.id for name in ast.walk(node.target) if isinstance(name, ast.Name)}
    return found


def _is_stored(node: ast.AST) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def _stores(block: list[ast.stmt]) -> set[str]:
    return {node.id for statement in block for node in ast.walk(statement) if _is_stored(node)}


def _of_self(node: ast.AST) -> TypeGuard[ast.Attribute]:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def _bare_attributes(block: ast.AST) -> set[str]:
    """X of ``self.X(...)`` and ``model = self.X``, but not of ``self.X.config``."""
    inner = {id(node.value) for node in ast.walk(block) if isinstance(node, ast.Attribute)}
    return {node.attr for node in ast.walk(block) if _of_self(node) and id(node) not in inner}


def _aliases(definition: ast.FunctionDef, names: set[str]) -> set[str]:
    """X of ``transformer = self.X`` before the loop, where the body reads ``transformer``."""
    assigns = [node for node in ast.walk(definition) if isinstance(node, ast.Assign) and _of_self(node.value)]
    read = [node for node in assigns if any(isinstance(t, ast.Name) and t.id in names for t in node.targets)]
    return {node.value.attr for node in read}  # type: ignore[attr-defined]


def _bound_by_with(node: ast.AST) -> Iterator[ast.Name]:
    """``progress_bar`` of ``with self.progress_bar(...) as progress_bar``."""
    if isinstance(node, ast.With):
        yield from (item.optional_vars for item in node.items if isinstance(item.optional_vars, ast.Name))


def _settled(test: ast.expr, function: Callable, hidden: set[str]) -> bool | None:
    """What a condition is if globals and absent callbacks alone decide it (``XLA_AVAILABLE``), else None."""
    visible = {name: value for name, value in function.__globals__.items() if name not in hidden | {"self"}}
    code = compile(ast.fix_missing_locations(ast.Expression(test)), "<condition>", "eval")
    try:
        return bool(eval(code, visible, dict.fromkeys(_CALLBACKS)))
    except NameError:
        return None


def _idle(block: list[ast.stmt], bars: set[str], settled: Callable[[ast.expr], bool | None]) -> bool:
    """True where a block only steps, moves the progress bar, calls absent callbacks, or serves absent hardware."""
    for statement in block:
        if isinstance(statement, ast.Assign) and _has_step(statement):  # of another state
            continue
        if isinstance(statement, ast.If):
            truth = settled(statement.test)
            branches = [statement.body] * (truth is not False) + [statement.orelse] * (truth is not True)
            if not all(_idle(branch, bars, settled) for branch in branches):
                return False
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            called = ast.unparse(statement.value.func)
            if called.split(".")[0] not in bars:
                return False
        elif not isinstance(statement, (ast.Pass, ast.Continue, ast.Assert)):
            return False
    return True
