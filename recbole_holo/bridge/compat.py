"""What RecBole 1.2 needs to run on current libraries: one version check and one shim per known break.

RecBole 1.2 was written against numpy 1, pandas 1-2, scipy < 1.13 and hyperopt 0.2.5. :func:`apply_shims` runs at
``import recbole_holo``, so that it is in force in every process that touches this package, spawned workers included.
A shim is a no-op where the installed libraries do not have its break, and none writes to RecBole's files.

To retire a shim, delete its class and its entry in :data:`SHIMS`. To switch one off for a run, name it in the
environment variable ``RECBOLE_HOLO_DISABLE_SHIMS`` (ids separated by commas), which the tests use to show each break.

Not mended here, on purpose:

* pandas 3: its faults with RecBole are silent and many, so :func:`check` refuses it.
* ``torch.load(weights_only=True)`` refusing RecBole's checkpoints: our trainer writes files that it accepts.
* ray: only ``recbole.quick_start`` imports it at module level, and this package never imports that module.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import os
import re
import sys
import threading
import traceback
import types
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from recbole_holo.errors import ConfigError, DataError, nearest

DISABLE_VARIABLE = "RECBOLE_HOLO_DISABLE_SHIMS"


# ---------------------------------------------------------------------------------------------------------------------
# Versions


def installed_version(package: str) -> str | None:
    """The installed version of a distribution, or None; the package itself is not imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """The numeric start of a version: ``release("2.0.0rc1") == (2, 0, 0)``."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def problems() -> list[str]:
    """Why this environment cannot be used, one sentence each with its remedy; empty when it can."""
    found = []
    recbole, pandas = installed_version("recbole"), installed_version("pandas")
    if recbole is None:
        found.append('RecBole is not installed: pip install "recbole>=1.2.0,<1.3"')
    elif release(recbole)[:2] != (1, 2):
        found.append(f'recbole {recbole} was found, recbole_holo extends 1.2: pip install "recbole>=1.2.0,<1.3"')
    if pandas is None:
        found.append('pandas is not installed: pip install "pandas<3"')
    elif release(pandas)[:1] >= (3,):
        found.append(
            f"pandas {pandas} was found, and RecBole 1.2 is wrong with pandas 3 without saying so: its "
            "`fillna(..., inplace=True)` on a column no longer changes the table, so the pad row of every item or user "
            "attribute becomes -9223372036854775808 (token) or nan (float), and the loss nan. "
            'Install an older one: pip install "pandas<3"'
        )
    return found


def check() -> None:
    """Refuse an environment in which results would be wrong.

    Raises:
        ImportError: for each of :func:`problems`, with the version found and the command that mends it.
    """
    if found := problems():
        raise ImportError("\n".join(found))


# ---------------------------------------------------------------------------------------------------------------------
# Acting on a module when it is imported, so that importing recbole_holo does not import RecBole


class _ImportHook(importlib.abc.MetaPathFinder):
    """Runs a context manager around the execution of a module that is imported later.

    The module is found by the ordinary finders and keeps its own loader; only this one load is wrapped.
    """

    def __init__(self) -> None:
        self.around: dict[str, Callable[[types.ModuleType], Any]] = {}
        self._searching: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.around or fullname in self._searching:
            return None
        self._searching.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching.discard(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute, around = spec.loader.exec_module, self.around[fullname]

        def exec_module(module: types.ModuleType) -> None:
            with around(module):
                execute(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_hook = _ImportHook()


def _around_import(name: str, around: Callable[[types.ModuleType], Any]) -> None:
    """Enter ``around(module)`` while module ``name`` is executed, or at once when it was imported before us."""
    if name in sys.modules:
        with around(sys.modules[name]):
            return
    _hook.around[name] = around
    if _hook not in sys.meta_path:
        sys.meta_path.insert(0, _hook)


# ---------------------------------------------------------------------------------------------------------------------
# Shims


@dataclass(frozen=True)
class Need:
    """Whether a shim has something to mend here, and what was looked at."""

    needed: bool
    why: str


class Shim(ABC):
    """One break of RecBole 1.2 on current libraries and its remedy.

    Attributes:
        id: name in :data:`SHIMS`, in the doctor's table and in ``RECBOLE_HOLO_DISABLE_SHIMS``.
        breaks: what a user sees without the shim.
        where: the lines of RecBole that break.
        upstream: where it was reported or mended upstream.
    """

    id: ClassVar[str]
    breaks: ClassVar[str]
    where: ClassVar[str]
    upstream: ClassVar[tuple[str, ...]]

    @abstractmethod
    def need(self) -> Need:
        """Look at the installed libraries, without importing RecBole."""

    @abstractmethod
    def apply(self) -> None:
        """Mend it. Called at most once a process, and only where :meth:`need` says so."""


class NumpyAliases(Shim):
    """Give numpy back the names it dropped (1.24: ``np.float`` and kin; 2.0: ``np.float_`` and kin).

    RecBole's ``Config`` sets the first group itself, from the second, which is gone in numpy 2. It also uses them in
    data worker and tuning processes where no ``Config`` was built, so they must be there from the import on. Only
    missing names are set; ``np.bool8`` is what old ``ray.tune`` releases ask for.
    """

    id = "numpy_aliases"
    breaks = "AttributeError: `np.float_` was removed in the NumPy 2.0 release"
    where = (
        "recbole/config/configurator.py Config.compatibility_settings; evaluator/metrics.py, data/interaction.py, "
        "data/dataset/dataset.py, model/layers.py, model/abstract_recommender.py, trainer/hyper_tuning.py"
    )
    upstream = (
        "https://github.com/RUCAIBox/RecBole/issues/1604",
        "https://github.com/RUCAIBox/RecBole/issues/2174",
        "https://github.com/RUCAIBox/RecBole/pull/2203",
    )

    aliases: ClassVar[Mapping[str, str]] = {
        "bool": "bool_",
        "int": "int_",
        "float": "float64",
        "complex": "complex128",
        "object": "object_",
        "str": "str_",
        "long": "int_",
        "unicode": "str_",
        "float_": "float64",
        "complex_": "complex128",
        "unicode_": "str_",
        "bool8": "bool_",
    }

    def _missing(self) -> list[str]:
        # vars() and not hasattr(): numpy's module __getattr__ warns or raises for each of these names.
        return [name for name in self.aliases if name not in vars(np)]

    def need(self) -> Need:
        missing = self._missing()
        if not missing:
            return Need(False, f"numpy {np.__version__} has every alias")
        return Need(True, f"numpy {np.__version__} lacks {', '.join(missing)}")

    def apply(self) -> None:
        for name in self._missing():
            setattr(np, name, getattr(np, self.aliases[name]))


class OptionalKmeans(Shim):
    """Let RecBole 1.2.0 import its models without ``kmeans_pytorch``.

    1.2.0 imports it at the top of one model file, LDiffRec, and looking up *any* model imports that file. 1.2.1 moved
    the import into the method that needs it, but its ``ray<=2.6.3`` has no build for Python 3.12, so there pip picks
    1.2.0. The stand-in exists only while that file is imported, so no other package can mistake it for the real one.
    """

    id = "optional_kmeans"
    breaks = "ModuleNotFoundError: No module named 'kmeans_pytorch', for every model"
    where = "recbole 1.2.0: recbole/model/general_recommender/ldiffrec.py, imported by recbole.utils.get_model"
    upstream = ("https://github.com/RUCAIBox/RecBole/blob/v1.2.1/recbole/model/general_recommender/ldiffrec.py",)

    def need(self) -> Need:
        version = installed_version("recbole")
        if version is None or release(version) >= (1, 2, 1):
            return Need(False, f"recbole {version} imports kmeans_pytorch only when LDiffRec clusters")
        if importlib.util.find_spec("kmeans_pytorch") is not None:
            return Need(False, "kmeans_pytorch is installed")
        return Need(True, f"recbole {version} imports kmeans_pytorch with every model, and it is not installed")

    def apply(self) -> None:
        @contextmanager
        def with_stand_in(module: types.ModuleType) -> Iterator[None]:
            stand_in = types.ModuleType("kmeans_pytorch")
            stand_in.kmeans = self._kmeans  # type: ignore[attr-defined]
            sys.modules["kmeans_pytorch"] = stand_in
            try:
                yield
            finally:
                del sys.modules["kmeans_pytorch"]

        _around_import("recbole.model.general_recommender.ldiffrec", with_stand_in)

    @staticmethod
    def _kmeans(*args: object, **kwargs: object) -> None:
        raise ImportError("LDiffRec with n_cate > 1 clusters items with kmeans_pytorch: pip install kmeans-pytorch")


class DokMatrixUpdate(Shim):
    """Give scipy's ``dok_matrix`` back ``_update``, which RecBole's graph models fill their adjacency with.

    scipy 1.13 stopped deriving the class from dict and dropped the method. It set each entry without checking it; here
    the public item assignment does, which checks, and which no change to scipy's insides can break.
    """

    id = "dok_matrix_update"
    breaks = "AttributeError: 'dok_matrix' object has no attribute '_update'"
    where = "recbole/model: LightGCN, NGCF, NCL, SpectralCF, GCMC, KGIN, MCCLK"
    upstream = (
        "https://github.com/RUCAIBox/RecBole/issues/2034",
        "https://github.com/RUCAIBox/RecBole/issues/2090",
    )

    def need(self) -> Need:
        version = installed_version("scipy")
        if version is None or release(version) < (1, 13):
            return Need(False, f"scipy {version} has dok_matrix._update")
        return Need(True, f"scipy {version} has no dok_matrix._update")

    def apply(self) -> None:
        @contextmanager
        def then_add_method(module: types.ModuleType) -> Iterator[None]:
            yield
            # Imported here: scipy.sparse takes longer to import than all of recbole_holo.
            from scipy.sparse import dok_matrix

            dok_matrix._update = self._update

        _around_import("recbole.model", then_add_method)

    @staticmethod
    def _update(matrix: Any, entries: Mapping[tuple[int, int], float]) -> None:
        if entries:
            rows, columns = np.array(list(entries)).T
            matrix[rows, columns] = np.fromiter(entries.values(), dtype=matrix.dtype, count=len(entries))


class ExhaustiveSearch(Shim):
    """Let RecBole's exhaustive tuning, its default, draw from hyperopt 0.2.6 and newer.

    RecBole hands hyperopt a ``numpy.random.RandomState``; hyperopt calls ``integers``, which only the newer
    ``numpy.random.Generator`` has. RecBole's tuning module gets its own view of numpy, in which ``RandomState`` knows
    ``integers``; numpy itself is untouched and the draws are those of ``randint``.
    """

    id = "exhaustive_search"
    breaks = "AttributeError: 'numpy.random.mtrand.RandomState' object has no attribute 'integers'"
    where = "recbole/trainer/hyper_tuning.py exhaustive_search"
    upstream = (
        "https://github.com/RUCAIBox/RecBole/issues/1868",
        "https://github.com/hyperopt/hyperopt/issues/838",
    )

    def need(self) -> Need:
        version = installed_version("hyperopt")
        if version is None:
            return Need(False, "hyperopt is not installed")
        if release(version) < (0, 2, 6):
            return Need(False, f"hyperopt {version} draws from a RandomState")
        return Need(True, f"hyperopt {version} asks a RandomState for `integers`")

    def apply(self) -> None:
        @contextmanager
        def then_replace_numpy(module: types.ModuleType) -> Iterator[None]:
            yield
            module.np = _View(np, random=_View(np.random, RandomState=_RandomStateWithIntegers))  # type: ignore[attr-defined]

        _around_import("recbole.trainer.hyper_tuning", then_replace_numpy)


class AnomalyMode(Shim):
    """Undo what importing RecBole's SINE does: it switches autograd's anomaly detection on, for the whole process.

    Importing any sequential model of RecBole imports SINE, so that every one of them trains with a stack trace recorded
    at every operation and every gradient searched for NaN, several times slower on small models.
    """

    id = "anomaly_mode"
    breaks = "anomaly detection is on after any sequential model of RecBole was imported"
    where = "recbole/model/sequential_recommender/sine.py:25"
    upstream = ()

    def need(self) -> Need:
        return Need(True, "RecBole's SINE switches autograd's anomaly detection on when it is imported")

    def apply(self) -> None:
        @contextmanager
        def then_restore(module: types.ModuleType) -> Iterator[None]:
            import torch  # takes longer to import than all of recbole_holo

            before = torch.is_anomaly_enabled() and not hasattr(module, "SINE")  # already imported: it was SINE's
            yield
            torch.autograd.set_detect_anomaly(before)

        _around_import("recbole.model.sequential_recommender.sine", then_restore)


class OwnLogger(Shim):
    """Have RecBole log through this package's logger: it takes the root logger, which is the application's.

    Records still reach the root logger's handlers, as those of any library do; without a run of this package nothing
    else changes.
    """

    id = "own_logger"
    breaks = "what RecBole logs, and the level and handlers that it needs for that, are the whole application's"
    where = "recbole: every `getLogger()`"
    upstream = ()

    modules: ClassVar[tuple[str, ...]] = (
        "config.configurator",
        "data.dataloader.abstract_dataloader",
        "data.dataloader.general_dataloader",
        "data.dataloader.knowledge_dataloader",
        "data.dataloader.user_dataloader",
        "data.dataset.dataset",
        "data.utils",
        "evaluator.metrics",
        "model.abstract_recommender",
        "trainer.trainer",
        "utils.url",
    )

    def need(self) -> Need:
        return Need(True, "RecBole logs through the root logger")

    def apply(self) -> None:
        @contextmanager
        def then_replace(module: types.ModuleType) -> Iterator[None]:
            yield
            module.getLogger = self._get_logger  # type: ignore[attr-defined]

        for name in self.modules:
            _around_import(f"recbole.{name}", then_replace)

    @staticmethod
    def _get_logger(name: str = "recbole_holo") -> logging.Logger:
        return logging.getLogger(name)


class _RandomStateWithIntegers(np.random.RandomState):
    """``RandomState`` under the name that ``numpy.random.Generator`` gives to its ``randint``."""

    def integers(self, low: int, high: int | None = None, size: Any = None) -> Any:
        return self.randint(low, high, size)


class _View(types.ModuleType):
    """A module seen with some of its attributes replaced."""

    def __init__(self, module: types.ModuleType, **replaced: object) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(replaced)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


SHIMS: dict[str, Shim] = {
    shim.id: shim
    for shim in (
        NumpyAliases(),
        OptionalKmeans(),
        DokMatrixUpdate(),
        ExhaustiveSearch(),
        AnomalyMode(),
        OwnLogger(),
    )
}
"""Every shim by its id."""


# ---------------------------------------------------------------------------------------------------------------------
# Applying them


@dataclass(frozen=True)
class ShimState:
    """What became of a shim in this process."""

    state: Literal["active", "not needed", "disabled"]
    why: str


_states: dict[str, ShimState] = {}


def _disabled() -> set[str]:
    """The shims that the environment variable names.

    Raises:
        ConfigError: a name is no shim, so that a typing error does not leave a shim on unnoticed.
    """
    names = {name.strip() for name in os.environ.get(DISABLE_VARIABLE, "").split(",")} - {""}
    for name in sorted(names - SHIMS.keys()):
        raise ConfigError(DISABLE_VARIABLE, name, nearest(name, SHIMS))
    return names


def apply_shims() -> dict[str, ShimState]:
    """Apply every shim that this environment needs, once a process; a further call only returns what was done."""
    disabled = _disabled()
    for shim_id, shim in SHIMS.items():
        if shim_id in _states:
            continue
        need = shim.need()
        if shim_id in disabled:
            _states[shim_id] = ShimState("disabled", f"named in {DISABLE_VARIABLE}; {need.why}")
        elif not need.needed:
            _states[shim_id] = ShimState("not needed", need.why)
        else:
            shim.apply()
            _states[shim_id] = ShimState("active", need.why)
    return shim_states()


def shim_states() -> dict[str, ShimState]:
    """What became of each shim in this process and why, by id."""
    return dict(_states)


def active_shims() -> list[str]:
    """The ids of the shims in force in this process."""
    return [shim_id for shim_id, state in _states.items() if state.state == "active"]


# ---------------------------------------------------------------------------------------------------------------------
# Warnings

# (message, category, module) of what RecBole 1.2 sets off at each run, none of which a user can act on: each names a
# call of RecBole, or of numpy on its behalf, whose result is right with the versions that check() admits.
_HARMLESS: tuple[tuple[str, type[Warning], str], ...] = (
    (r"A value is trying to be set on a copy", FutureWarning, r"recbole\."),  # data/dataset: fillna in place
    (r"using <built-in function len> in Series\.agg", FutureWarning, r"recbole\."),  # data/dataset: list lengths
    (r"`torch\.cuda\.amp\.", FutureWarning, r"recbole\."),  # trainer: the older spelling of torch.amp
    (r"torch\.sparse\.SparseTensor", UserWarning, r"recbole\."),  # graph models: the older sparse constructor
    (r"__array_wrap__ must accept", DeprecationWarning, r"numpy\."),  # data/interaction: argsort of a tensor
)


# In a process of the command's: all that these libraries warn of, which nobody who runs it can act on.
_ALL_OF_THEIRS = ((r"", Warning, r"(recbole|pandas)(\.|$)"),)

Filter = tuple[str, re.Pattern[str], type[Warning], re.Pattern[str], int]
_quiet_lock = threading.Lock()


@contextmanager
def quiet_recbole(in_the_command: bool = False) -> Iterator[None]:
    """Silence the harmless warnings that RecBole 1.2 sets off in current libraries, inside the block only.

    The one place where this package filters warnings. Anything not listed still shows. Filters that somebody else sets
    meanwhile, in this thread or another, stay as they are, unlike with :func:`warnings.catch_warnings`.

    Args:
        in_the_command: the process is the command's own, whose users see none of RecBole's and pandas' warnings.
    """
    own: list[Filter] = [
        ("ignore", re.compile(message, re.IGNORECASE), category, re.compile(module), 0)
        for message, category, module in (*_HARMLESS, *(_ALL_OF_THEIRS if in_the_command else ()))
    ]
    with _quiet_lock:
        where: Any = warnings.filters
        where[:0] = own
    try:
        yield
    finally:
        with _quiet_lock:
            # Whoever entered catch_warnings() inside of the block left a copy of the list behind.
            current: Any = warnings.filters
            for filters in (where, current):
                filters[:] = [one for one in filters if not any(one is mine for mine in own)]


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@contextmanager
def recboles_refusals(what: str) -> Iterator[None]:
    """Turns what RecBole itself refuses inside the block (``raise ValueError(...)`` in its files) into a DataError of
    one line about ``what``; an error out of another library's files stays as it is."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if isinstance(error, (ConfigError, DataError)) or f"{os.sep}recbole{os.sep}" not in raised_in:
            raise
        raise DataError(f"{what}: {' '.join(str(error).split())}") from error
