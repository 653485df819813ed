"""Search spaces: RecBole's ``params_dict`` as YAML, and its text form (``hyper.test``)."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from recbole_holo.bridge import resources
from recbole_holo.errors import ConfigError, nearest

if TYPE_CHECKING:
    import optuna

# distribution -> what its values are
DISTRIBUTIONS = {
    "choice": "a list of options",
    "uniform": "[low, high]",
    "loguniform": "[low, high], both natural logarithms",
    "quniform": "[low, high, step]",
}


@dataclass(frozen=True)
class Parameter:
    """One searched setting.

    Attributes:
        name: the configuration key.
        distribution: one of :data:`DISTRIBUTIONS`.
        values: the options of a choice, else the numbers that bound the distribution.
    """

    name: str
    distribution: str
    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        field = f"{self.distribution}.{self.name}"
        if self.distribution == "choice":
            if not self.values:
                raise ConfigError(field, [], "list at least one option")
            return
        numbers = [value for value in self.values if isinstance(value, int | float) and not isinstance(value, bool)]
        expected = 3 if self.distribution == "quniform" else 2
        if len(self.values) != expected or len(numbers) != expected:
            raise ConfigError(field, list(self.values), f"give {DISTRIBUTIONS[self.distribution]}")
        low, high, *step = numbers
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ConfigError(field, list(self.values), "the low bound must be below the high one")
        if step and not 0 < step[0] <= high - low:
            raise ConfigError(field, list(self.values), "the step must be above 0 and no wider than the bounds")
        if self.distribution == "loguniform" and low > 0 and high < 1:
            raise ConfigError(
                field,
                list(self.values),
                f"the bounds are natural logarithms, so this draws from {math.exp(low):.4g} to {math.exp(high):.4g}; "
                f"for values from {low:g} to {high:g} write [{math.log(low):.4g}, {math.log(high):.4g}]",
            )

    @property
    def options(self) -> dict[str, Any]:
        """A choice's options by the names that Optuna knows them by; none of another distribution."""
        return {repr(value): value for value in self.values} if self.distribution == "choice" else {}

    def suggest(self, trial: optuna.Trial) -> Any:
        """The setting that a trial tries: an option with its type, a multiple of the step, a number."""
        if self.distribution == "choice":
            return self.options[trial.suggest_categorical(self.name, list(self.options))]
        low, high, *steps = self.values
        if self.distribution == "loguniform":
            return trial.suggest_float(self.name, math.exp(low), math.exp(high), log=True)
        if not steps:
            return trial.suggest_float(self.name, low, high)
        step = steps[0]
        # Multiples of the step, as hyperopt's; the rounding is for 0.7 / 0.1, which is a little below 7.
        low, high = _short(math.ceil(round(low / step, 9)) * step), _short(math.floor(round(high / step, 9)) * step)
        if all(float(value).is_integer() for value in (low, high, step)):
            return trial.suggest_int(self.name, int(low), int(high), step=int(step))
        return _short(trial.suggest_float(self.name, low, high, step=step))


def _short(number: float) -> float:
    """0.3 for 0.30000000000000004."""
    return float(f"{number:.12g}")


class _SpaceLoader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-3`` as a string; here, as in RecBole's own files, it is a number."""


_SpaceLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_space(source: str | Path | Mapping[str, Any]) -> dict[str, Parameter]:
    """Read a search space.

    Args:
        source: a ``.yaml``/``.yml`` file, a file in RecBole's text form (any other suffix), the name of a space that
            the package ships (``HoloMambaRec``), or what the YAML file holds.

    Returns:
        The searched parameters by name, in the file's order.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: the space is empty or malformed, names an unknown distribution, or a parameter twice.
    """
    if isinstance(source, Mapping):
        entries, origin = list(_entries_of_mapping(source)), "search_space"
    else:
        path, origin = Path(source), str(source)
        if not path.is_file() and path.parent in (Path(), Path("properties/search")):
            path = resources.properties("search", f"{path.stem}.yaml")  # a shipped space, from any directory
        if not path.is_file():
            raise FileNotFoundError(
                f"search_space: {origin!r} is no file; give a YAML file, RecBole's hyper.test form, or the name of a "
                "shipped space such as HoloMambaRec"
            )
        text = path.read_text("utf-8")
        yaml_form = path.suffix in (".yaml", ".yml")
        entries = list(_entries_of_mapping(_load_yaml(text, origin)) if yaml_form else _entries_of_text(text, origin))
    space: dict[str, Parameter] = {}
    for distribution, name, values in entries:
        if distribution not in DISTRIBUTIONS:
            raise ConfigError(f"{origin}: distribution", distribution, nearest(distribution, DISTRIBUTIONS))
        if name in space:
            raise ConfigError(f"{origin}: {distribution}.{name}", values, "it is searched twice: keep one of the two")
        if not isinstance(values, list | tuple):
            raise ConfigError(f"{origin}: {distribution}.{name}", values, f"give {DISTRIBUTIONS[distribution]}")
        space[name] = Parameter(name, distribution, tuple(values))
    if not space:
        raise ConfigError(
            "search_space", origin, "it names no parameter; for example `choice: {learning_rate: [1e-3]}`"
        )
    return space


def _load_yaml(text: str, origin: str) -> Mapping[str, Any]:
    try:
        content = yaml.load(text, Loader=_SpaceLoader)
    except yaml.YAMLError as error:
        raise ConfigError("search_space", origin, f"it is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ConfigError("search_space", origin, "the file must map distributions to parameters: `choice: {...}`")
    return content


def _entries_of_mapping(content: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for distribution, parameters in content.items():
        if distribution not in DISTRIBUTIONS:
            raise ConfigError("search_space: distribution", distribution, nearest(distribution, DISTRIBUTIONS))
        if not isinstance(parameters, Mapping):
            raise ConfigError(
                f"search_space: {distribution}", parameters, f"map parameters to {DISTRIBUTIONS[distribution]}"
            )
        for name, values in parameters.items():
            yield distribution, str(name), values


def _entries_of_text(text: str, origin: str) -> Iterator[tuple[str, str, Any]]:
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split(maxsplit=2)
        if not words or words[0].startswith("#"):
            continue
        if len(words) < 3:
            raise ConfigError(f"{origin} line {number}", line, "write `name distribution values`")
        name, distribution, values = words
        try:
            # `1, 4, 1` without brackets is how RecBole writes bounds; it parses as a tuple.
            yield distribution, name, ast.literal_eval(values)
        except (ValueError, SyntaxError) as error:
            raise ConfigError(f"{origin} line {number}", values, "write numbers, strings or a list") from error
