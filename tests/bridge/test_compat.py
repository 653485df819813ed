"""Each shim against the break it mends: with it off RecBole fails as documented, with it on RecBole works.

The breaks are shown in fresh processes, because a shim stays in force once it is applied.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import coo_matrix, dok_matrix

from recbole_holo.bridge import compat
from recbole_holo.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]

# shim -> (what a user does, the error when the shim is off)
BREAKS = {
    "numpy_aliases": (
        "from recbole.data.interaction import _convert_to_tensor\n"
        "_convert_to_tensor(np.array([1.0]))  # what a data worker does, which builds no Config\n"
        "from recbole.config import Config\n"
        "Config(model='BPR', dataset='ml-100k', config_dict={'use_gpu': False})\n",
        "module 'numpy' has no attribute 'float'",
    ),
    "optional_kmeans": (
        "from recbole.utils import get_model\n"
        "assert get_model('GRU4Rec').__name__ == 'GRU4Rec'\n"
        "assert 'kmeans_pytorch' not in sys.modules\n",
        "No module named 'kmeans_pytorch'",
    ),
    "dok_matrix_update": (
        "from recbole.config import Config\n"
        "from recbole.data import create_dataset, data_preparation\n"
        "from recbole.model.general_recommender.lightgcn import LightGCN\n"
        "from recbole.trainer import Trainer\n"
        "config = Config(model='LightGCN', dataset='ml-100k', config_dict={'use_gpu': False, 'epochs': 1,\n"
        "    'embedding_size': 8, 'train_batch_size': 16384, 'show_progress': False})\n"
        "train, valid, test = data_preparation(config, create_dataset(config))\n"
        "model = LightGCN(config, train.dataset)\n"
        "assert model.norm_adj_matrix._nnz() == 2 * train.dataset.inter_matrix('coo').nnz\n"
        "score, _ = Trainer(config, model).fit(train, valid, saved=False, verbose=False)\n"
        "assert score > 0\n",
        "'dok_matrix' object has no attribute '_update'",
    ),
    "anomaly_mode": (
        "import torch\n"
        "from recbole.model.sequential_recommender import GRU4Rec\n"
        "assert not torch.is_anomaly_enabled(), 'anomaly detection is on'\n",
        "anomaly detection is on",
    ),
    "own_logger": (  # the application's root logger is taken
        "import logging, recbole.trainer, recbole.data, recbole.model.sequential_recommender\n"
        "taken = [name for name, module in sys.modules.items() if name.startswith('recbole.')\n"
        "         and not hasattr(module, '__path__')  # packages take the name in with others, and do not call it\n"
        "         and getattr(module, 'getLogger', None) is logging.getLogger]\n"
        "assert not taken, f'the root logger is taken by {taken}'\n"
        "assert recbole.trainer.trainer.getLogger().name == 'recbole_holo'\n",
        "the root logger is taken by",
    ),
    "exhaustive_search": (
        "from recbole.trainer import HyperTuning\n"
        "def objective(settings, files):\n"
        "    score = {'s': -settings['a']}\n"
        "    return dict(model='M', best_valid_score=-settings['a'], valid_score_bigger=True,\n"
        "                best_valid_result=score, test_result=score)\n"
        "search = HyperTuning(objective, params_dict={'choice': {'a': [3, 1, 2]}}, algo='exhaustive')\n"
        "search.run()\n"
        "assert search.best_params == {'a': 1}\n"
        "assert len(search.score_list) == 3\n"
        "assert not hasattr(np.random.RandomState, 'integers')\n",
        "RandomState' object has no attribute 'integers'",
    ),
}


def python(code: str, disable: str = "", first: str = "import recbole_holo\n") -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process, by default after importing the package."""
    environment = os.environ | {
        compat.DISABLE_VARIABLE: disable,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    return subprocess.run(
        [sys.executable, "-c", f"import sys\n{first}import numpy as np\n{code}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_every_shim_has_a_break_to_show() -> None:
    assert BREAKS.keys() == compat.SHIMS.keys()
    for shim_id, shim in compat.SHIMS.items():
        assert shim.id == shim_id
        assert shim.breaks
        assert shim.where
        assert all(link.startswith("https://github.com/") for link in shim.upstream)
        assert shim.__doc__


@pytest.mark.parametrize("shim_id", BREAKS)
def test_the_shim_mends_its_break(shim_id: str) -> None:
    if shim_id == "exhaustive_search":
        pytest.importorskip("hyperopt")
    code, error = BREAKS[shim_id]
    mended = python(code)
    assert mended.returncode == 0, mended.stderr
    broken = python(code, disable=shim_id)
    if compat.shim_states()[shim_id].state == "active":
        assert broken.returncode != 0
        assert error in broken.stderr
    else:
        assert broken.returncode == 0, broken.stderr


@pytest.mark.skipif(compat.release(np.__version__) < (2,), reason="numpy 1 has np.float_")
def test_config_needs_the_aliases_of_numpy_1() -> None:
    code = "from recbole.config import Config\nConfig(model='BPR', dataset='ml-100k')"
    broken = python(code, disable="numpy_aliases")
    assert broken.returncode != 0
    assert "`np.float_` was removed in the NumPy 2.0 release" in broken.stderr


def test_states_say_what_was_found() -> None:
    found = json.loads(
        python(
            "import json\nfrom recbole_holo.bridge import compat\n"
            "print(json.dumps({name: [s.state, s.why] for name, s in compat.shim_states().items()}))",
            disable="numpy_aliases, dok_matrix_update",
        ).stdout
    )
    assert list(found) == list(compat.SHIMS)
    assert found["numpy_aliases"][0] == found["dok_matrix_update"][0] == "disabled"
    assert compat.DISABLE_VARIABLE in found["numpy_aliases"][1]
    recbole, hyperopt = compat.installed_version("recbole"), compat.installed_version("hyperopt")
    assert str(recbole) in found["optional_kmeans"][1] or "is installed" in found["optional_kmeans"][1]
    assert (found["exhaustive_search"][0] == "active") == (compat.release(hyperopt or "0") >= (0, 2, 6))


def test_needs_follow_the_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    versions: dict[str, str | None] = {"recbole": "1.2.1", "scipy": "1.12.0", "hyperopt": "0.2.5"}
    monkeypatch.setattr(compat, "installed_version", versions.get)
    shims = ("optional_kmeans", "dok_matrix_update", "exhaustive_search")
    assert not any(compat.SHIMS[name].need().needed for name in shims)
    versions |= {"recbole": "1.2.0", "scipy": "1.13.0", "hyperopt": "0.2.6"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert all(compat.SHIMS[name].need().needed for name in shims)
    versions["hyperopt"] = None
    assert compat.SHIMS["exhaustive_search"].need() == compat.Need(False, "hyperopt is not installed")


def test_applying_again_changes_nothing() -> None:
    before, path = compat.shim_states(), list(sys.meta_path)
    assert compat.apply_shims() == before
    assert sys.meta_path == path
    assert compat.active_shims() == [name for name, state in before.items() if state.state == "active"]


def test_spawned_workers_have_the_shims() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(compat.active_shims) == compat.active_shims()


@pytest.mark.parametrize("shim_id", ["dok_matrix_update", "exhaustive_search", "anomaly_mode", "own_logger"])
def test_modules_imported_before_the_package_are_mended_too(shim_id: str) -> None:
    if shim_id == "exhaustive_search":
        pytest.importorskip("hyperopt")
    code, _ = BREAKS[shim_id]
    first = "import recbole.model, recbole.trainer.hyper_tuning\nimport recbole_holo\n"
    done = python(code, first=first)
    assert done.returncode == 0, done.stderr


def test_kmeans_stand_in_says_what_to_install() -> None:
    with pytest.raises(ImportError, match="pip install kmeans-pytorch"):
        compat.OptionalKmeans._kmeans(1, num_clusters=2)


def test_dok_update_sets_entries() -> None:
    entries = {(np.int32(0), np.int32(2)): 1, (2, 0): 1, (1, 1): 3}
    matrix = dok_matrix((3, 3), dtype=np.float32)
    compat.DokMatrixUpdate._update(matrix, entries)
    expected = coo_matrix(([1, 1, 3], ([0, 2, 1], [2, 0, 1])), shape=(3, 3)).toarray()
    assert np.array_equal(matrix.toarray(), expected)
    compat.DokMatrixUpdate._update(matrix, {})
    assert np.array_equal(matrix.toarray(), expected)


def test_unknown_shim_is_refused() -> None:
    done = python("", disable="numpy_alias")
    assert done.returncode != 0
    assert "'numpy_alias'" in done.stderr
    assert "did you mean numpy_aliases" in done.stderr


def test_unknown_shim_error_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compat.DISABLE_VARIABLE, "kmeans")
    with pytest.raises(ConfigError, match="kmeans"):
        compat.apply_shims()


# ---------------------------------------------------------------------------------------------------------------------
# What is and is not imported


def test_importing_the_package_is_light() -> None:
    done = python("print([name for name in ('torch', 'pandas', 'scipy', 'recbole') if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_optional_packages_and_quick_start_are_never_imported() -> None:
    done = python(
        "import recbole_holo.quick_start, recbole_holo.tuning, recbole_holo.doctor, recbole_holo.cli\n"
        "print([name for name in ('ray', 'hyperopt', 'kmeans_pytorch', 'recbole.quick_start') if name in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_recbole_imports_without_its_optional_packages() -> None:
    done = python(
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('ray', 'hyperopt', 'kmeans_pytorch', 'thop', 'wandb'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import recbole.config, recbole.data, recbole.evaluator, recbole.sampler, recbole.trainer, recbole.utils\n"
        "import recbole.model.general_recommender, recbole.model.sequential_recommender\n"
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Versions that are refused

PANDAS_3 = (
    "import importlib.metadata\n"
    "real = importlib.metadata.version\n"
    "importlib.metadata.version = lambda name: '3.1.1' if name == 'pandas' else real(name)\n"
)


def test_pandas_3_is_refused_at_import() -> None:
    done = python("", first=PANDAS_3 + "import recbole_holo\n")
    assert done.returncode != 0
    for part in ("ImportError", "pandas 3.1.1", "-9223372036854775808", "nan", 'pip install "pandas<3"'):
        assert part in done.stderr


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ({"recbole": "1.2.1", "pandas": "2.3.3"}, []),
        ({"recbole": "1.2.0", "pandas": "3.0.0rc1"}, ["pandas 3.0.0rc1"]),
        ({"recbole": "1.1.1", "pandas": "2.0.0"}, ["recbole 1.1.1"]),
        ({}, ["RecBole is not installed", "pandas is not installed"]),
    ],
)
def test_versions(versions: dict[str, str], expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "installed_version", versions.get)
    found = compat.problems()
    assert len(found) == len(expected)
    for text, start in zip(found, expected, strict=True):
        assert text.startswith(start)
        assert "pip install" in text
    if found:
        with pytest.raises(ImportError, match=expected[0]):
            compat.check()
    else:
        compat.check()


def test_release() -> None:
    assert compat.release("2.0.0rc1") == (2, 0, 0)
    assert compat.release("0.1.1.post22") == (0, 1, 1)
    assert compat.release("unknown") == ()


# ---------------------------------------------------------------------------------------------------------------------
# Warnings


def test_quiet_blocks_leave_all_other_filters_as_they_are() -> None:
    """catch_warnings puts back what it found: a filter that another thread, or the block itself, set meanwhile was
    lost, and of two blocks that overlap the filters of one stayed for ever."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="before")
        before = list(warnings.filters)
        first, second = compat.quiet_recbole(), compat.quiet_recbole(in_the_command=True)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        warnings.filterwarnings("ignore", message="of the host")
        with warnings.catch_warnings():
            second.__exit__(None, None, None)
            own = list(warnings.filters)
        assert list(warnings.filters) == own == [warnings.filters[0], *before]
        assert warnings.filters[0][1].pattern == "of the host"  # type: ignore[union-attr]


def test_the_commands_users_see_none_of_recboles_and_pandas_warnings_but_ours() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with compat.quiet_recbole(in_the_command=True):
            for module in (
                "recbole.trainer.trainer",
                "pandas.core.frame",
                "recbole_holo.data.loader",
                "recboles",
                "mine",
            ):
                warnings.warn_explicit("something new", FutureWarning, "file.py", 1, module=module, registry={})
    assert len(caught) == 3


def test_quiet_recbole_silences_only_what_is_listed() -> None:
    def warn(message: str, module: str, category: type[Warning] = FutureWarning) -> None:
        warnings.warn_explicit(message, category, "file.py", 1, module=module, registry={})

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with compat.quiet_recbole():
            warn("A value is trying to be set on a copy of a DataFrame", "recbole.data.dataset.dataset")
            warn("`torch.cuda.amp.GradScaler(args...)` is deprecated", "recbole.trainer.trainer")
            assert caught == []
            warn("A value is trying to be set on a copy of a DataFrame", "recbole_holo.data.loader")
            warn("something new", "recbole.trainer.trainer")
        warn("`torch.cuda.amp.GradScaler(args...)` is deprecated", "recbole.trainer.trainer")
    assert len(caught) == 3
