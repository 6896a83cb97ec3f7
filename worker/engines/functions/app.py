"""From `--app MODULE:NAME` to the functions that are in it."""

import importlib
import inspect
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import structlog

from rejoinder.worker.engines.functions.binding import Function, marked, of_service
from rejoinder.worker.engines.functions.context import Context, Deployment
from rejoinder.worker.engines.functions.failures import Escaped
from rejoinder.worker.engines.functions.signatures import annotation_of, check_of, named, parameters
from rejoinder.worker.errors import BadRequest, EngineGone
from rejoinder.worker.functions import Mark, marks_of

log = structlog.get_logger(__name__)

KINDS = ("generate", "generate_batch", "generate_stream")


@dataclass(frozen=True, slots=True)
class App:
    """What a module has for us: marked functions, or a service."""

    name: str
    """As the user gave it."""
    marked: Sequence[tuple[Callable[..., Any], Mark]] = ()
    init: Callable[..., Any] | None = None
    service: Callable[..., Any] | None = None


def load(name: str, folder: Path) -> App:
    """Import the app's module and find what is in it.

    Args:
        name: `MODULE` or `MODULE:NAME`.
        folder: Where modules are looked for first.

    Raises:
        EngineGone: it cannot be imported, or there is nothing to serve in it.
    """
    module_name, _, attribute = name.partition(":")
    module = _imported(name, module_name, folder)
    inits = [value for value in _distinct(module) if any(mark.kind == "init" for mark in marks_of(value))]
    if len(inits) > 1:
        raise EngineGone(f"app {name!r}: {_names(inits)} are all marked @init, and one can be")
    init = inits[0] if inits else None
    if not attribute:
        return _of_marked(name, _distinct(module), init, f"module {module_name!r}")
    try:
        value = operator.attrgetter(attribute)(module)
    except AttributeError as exc:
        raise EngineGone(f"app {name!r}: there is no {attribute!r} in module {module_name!r}") from exc
    if marks_of(value):
        return _of_marked(name, [value], init, repr(attribute))
    if not callable(value):
        raise EngineGone(f"app {name!r}: {attribute!r} is no function, but of type {type(value).__name__}")
    return App(name, service=value)


def _of_marked(name: str, values: Sequence[Any], init: Callable[..., Any] | None, where: str) -> App:
    found = [(value, mark) for value in values for mark in marks_of(value) if mark.kind != "init"]
    if not found:
        kinds = ", ".join(f"@{kind}" for kind in KINDS)
        raise EngineGone(
            f"app {name!r}: nothing in {where} is marked with one of {kinds}; a service is named as MODULE:NAME"
        )
    return App(name, found, init)


def _imported(name: str, module: str, folder: Path) -> ModuleType:
    if not folder.is_dir():
        raise EngineGone(f"app_dir {folder} is no directory")
    if name.endswith(":") or not all(part.isidentifier() for part in module.split(".")):
        raise EngineGone(
            f"app {name!r} is no name of an app: it should be MODULE or MODULE:NAME, as in my_package.my_module"
        )
    if str(folder) not in sys.path[:1]:
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as exc:
        if exc.name is not None and f"{module}.".startswith(f"{exc.name}."):
            raise EngineGone(f"app {name!r}: there is no module {exc.name!r} in {folder}, nor is it installed") from exc
        raise
    _no_other(found, module, folder, name)
    return found


def _no_other(found: ModuleType, module: str, folder: Path, name: str) -> None:
    """Refuse a module that was imported, by Python or by us, before the one of its name in the folder could be."""
    wanted, file = folder.joinpath(*module.split(".")), getattr(found, "__file__", None)
    if not (wanted.with_suffix(".py").is_file() or (wanted / "__init__.py").is_file()):
        return
    # By its folder: it may be compiled, a link, or a package.
    places = [place for place in (wanted.parent, wanted) if place.is_dir()]
    if file is None or not any(Path(file).parent.samefile(place) for place in places):
        what = file or "a part of Python"
        raise EngineGone(f"app {name!r}: {module!r} is {what}, and hides the one in {folder}: rename yours")


def _distinct(module: ModuleType) -> list[Any]:
    """The module's marked functions, in order, those of several names once."""
    return list({id(value): value for value in vars(module).values() if marks_of(value)}.values())


def _names(functions: Sequence[Any]) -> str:
    return " and ".join(map(name_of, functions))


def name_of(function: Any) -> str:
    """What to call a function in a message."""
    return str(getattr(function, "__name__", None) or type(function).__name__)


def bound(app: App, deployment: Deployment) -> list[Function]:
    """The app's marked functions.

    Raises:
        EngineGone: the parameters of one are not what it may have.
    """
    return [marked(function, mark, f"{mark.kind} {name_of(function)!r}", deployment) for function, mark in app.marked]


def starter(app: App, deployment: Deployment) -> Callable[[], Any] | None:
    """What has to be called first: the app's `init`, or the service itself; None: nothing.

    Raises:
        EngineGone: its parameters are not what it may have, or `app_params` does not fit.
    """
    context = Context(deployment=deployment)
    if app.service is not None:
        service = app.service
        try:
            inspect.signature(service).bind(context, **deployment.params)
        except (TypeError, ValueError) as exc:
            name = f"service {name_of(service)!r}"
            raise EngineGone(f"{name} does not take (context, **app_params): {exc}") from exc
        return lambda: service(context, **deployment.params)
    return None if app.init is None else _init(app.init, context)


def _init(init: Callable[..., Any], context: Context) -> Callable[[], Any]:
    name = f"init {name_of(init)!r}"
    all_ = parameters(init, name)
    first = all_[0] if all_ and all_[0].name != "context" and all_[0].kind != inspect.Parameter.VAR_KEYWORD else None
    names = named(all_[1:] if first is not None else all_, name, ("context",))
    given = {"context": context} if names else {}
    if first is None:
        return lambda: init(**given)
    check = check_of(annotation_of(init, first, name), name)
    try:
        custom = context.params if check is None else check(context.params)
    except BadRequest as exc:
        raise EngineGone(f"app_params do not fit {name}: {exc.message}") from exc
    if first.kind is inspect.Parameter.KEYWORD_ONLY:
        return lambda: init(**{first.name: custom}, **given)
    return lambda: init(custom, **given)


def of_returned(app: App, returned: Any) -> list[Function]:
    """The functions that a service returned: one, or several in a tuple or list.

    Raises:
        EngineGone: something else was returned.
    """
    closures = returned if isinstance(returned, tuple | list) else (returned,)
    found: list[Function] = []
    for closure in closures:
        marks = [mark for mark in marks_of(closure) if mark.kind != "init"]
        if not marks and callable(closure) and name_of(closure) in KINDS:
            marks = [Mark(name_of(closure))]  # type: ignore[arg-type]  # it is one of the kinds
        if not marks:
            what = name_of(closure) if callable(closure) else f"a value of type {type(closure).__name__}"
            raise EngineGone(f"app {app.name!r} returned {what}; a service returns functions called {', '.join(KINDS)}")
        found += [of_service(closure, mark, f"{mark.kind} {name_of(closure)!r}") for mark in marks]
    if not found:
        raise EngineGone(f"app {app.name!r} returned nothing; a service returns functions called {', '.join(KINDS)}")
    return found


def gone(exc: BaseException, what: str, fields: Mapping[str, Any]) -> EngineGone:
    """The end of a start at which the user's own code raised: one line, and the traceback in the log."""
    if isinstance(exc, Escaped):
        exc = exc.original
    if isinstance(exc, EngineGone):
        return exc
    log.error("app_failed", **fields, exc_info=exc)
    first = str(exc).strip().partition("\n")[0][:300]
    return EngineGone(f"{what} failed: {type(exc).__name__}{': ' if first else ''}{first}")
