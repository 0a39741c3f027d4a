"""Plugins: found, checked, isolated when broken. What is installed besides is left out of every comparison."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from harness.contracts.executor import Executor
from harness.contracts.registry import Registry, load_plugins
from harness.contracts.scorer import Scorer
from harness.core.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1]))
plugin_packages: ModuleType = importlib.import_module("plugin_packages")
executor = plugin_packages.executor
Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install packages into a folder of this test's own; their modules are forgotten afterwards."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    before = set(sys.modules)

    def add(distribution: str, module: str, source: str, entry: str | None = None) -> Path:
        file: Path = plugin_packages.install(site, distribution, module, source, entry)
        importlib.invalidate_caches()
        return file

    yield add
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def own(registry: Registry) -> set[tuple[str, str]]:
    """What the test's own packages and files registered."""
    return {key for key, entry in registry.entries.items() if entry.origin.distribution != "harness-align"}


def text_of(error: pytest.ExceptionInfo[UserError]) -> str:
    return str(error.value)


def test_an_installed_package_is_found_with_its_pedigree(install: Install) -> None:
    install("reg-good", "reg_good", executor("reg_mine"))
    registry = load_plugins()
    entry = registry.registered(Executor, "reg_mine", "--executor")
    assert (entry.kind, entry.origin.distribution, entry.origin.version) == ("executor", "reg-good", "1.2")
    assert entry.origin.hooks == ("register_executors",)
    assert entry.origin.heavy == ()
    assert entry.origin.import_seconds > 0
    assert "reg_mine" in registry.names("executor")
    assert ("reg_mine", entry.plugin) in list(registry.of_kind(Executor))


def test_every_registry_is_fresh(install: Install) -> None:
    install("reg-good", "reg_good", executor("reg_mine"))
    one, two = load_plugins(), load_plugins()
    one.entries.clear()
    assert own(two) == {("executor", "reg_mine")}


def test_two_distributions_with_one_name_are_both_named(install: Install) -> None:
    install("reg-alpha", "reg_alpha", executor("same"))
    install("reg-beta", "reg_beta", executor("same"))
    with pytest.raises(UserError) as caught:
        load_plugins()
    # Entry points are taken in order of name, so that the second one is the culprit on every machine.
    assert text_of(caught) == (
        "plugin reg-beta (entry point reg_beta): executor 'same' is also offered by reg-alpha (entry point reg_alpha)\n"
        "  Uninstall one of them: reg-beta or reg-alpha."
    )
    lenient = load_plugins(strict=False)
    assert [str(problem) for problem in lenient.problems] == [text_of(caught)]
    assert lenient.registered(Executor, "same", "").origin.distribution == "reg-alpha"


@pytest.mark.parametrize("statement", ["import reg_no_such_module", "raise ValueError('torn')", "raise SystemExit(5)"])
def test_a_broken_plugin_is_isolated_and_explained_when_asked_for(install: Install, statement: str) -> None:
    install("reg-broken", "reg_broken", f"{statement}\n", entry="shaky")
    install("reg-good", "reg_good", executor("reg_mine"))
    registry = load_plugins()
    assert own(registry) == {("executor", "reg_mine")}
    (origin,) = (o for o in registry.origins if o.distribution == "reg-broken")
    assert origin.error is not None
    for name in ("shaky", "reg-broken"):
        with pytest.raises(UserError) as caught:
            registry.find(Scorer, name, "--scorer")
        text = text_of(caught)
        assert text.startswith(f"--scorer: plugin '{name}' of reg-broken (entry point shaky) did not load: ")
        assert "Mend or uninstall it. Its traceback:\nTraceback (most recent call last):" in text
        assert statement in text
    with pytest.raises(
        UserError, match=r"It may belong to a plugin that did not load: reg-broken \(entry point shaky\)"
    ):
        registry.find(Scorer, "something-else", "--scorer")


def test_a_misspelt_hook_is_an_error_with_its_line_and_the_nearest_name(install: Install) -> None:
    source = "from harness import hookimpl\n\n\n@hookimpl\ndef register_scorer():\n    yield 1\n"
    file = install("reg-typo", "reg_typo", source)
    with pytest.raises(UserError) as caught:
        load_plugins()
    assert text_of(caught) == (
        f"{file}:4, plugin reg-typo (entry point reg_typo): unknown hook 'register_scorer'\n"
        "  Did you mean 'register_scorers'?"
    )


def test_a_misspelt_hook_does_not_hurt_other_plugins_when_listing(install: Install) -> None:
    install("reg-aaa", "reg_aaa", executor("lost") + "\n@hookimpl\ndef zzz_qqq():\n    pass\n")
    install("reg-good", "reg_good", executor("reg_mine"))
    registry = load_plugins(strict=False)
    assert own(registry) == {("executor", "reg_mine")}
    assert "unknown hook 'zzz_qqq'\n  Hooks: register_aligners, register_adapters," in str(registry.problems[0])
    with pytest.raises(UserError, match=r"reg_aaa.* did not load: unknown hook 'zzz_qqq'"):
        registry.find(Executor, "reg_aaa", "--executor")


def test_a_hook_with_wrong_arguments_breaks_its_plugin_and_leaves_nothing_behind(
    install: Install, tmp_path: Path
) -> None:
    # Defined before the wrong hook, so pluggy has already taken it in when it finds the wrong one.
    source = executor("lost") + (
        "\n@hookimpl\ndef step_finished(record):\n    raise RuntimeError('still here')\n"
        "\n@hookimpl\ndef study_finished(nonsense):\n    pass\n\n@hookimpl\ndef zzz():\n    pass\n"
    )
    install("reg-aaa", "reg_aaa", source)
    install("reg-good", "reg_good", executor("reg_mine"))
    registry = load_plugins()
    assert own(registry) == {("executor", "reg_mine")}
    (origin,) = (o for o in registry.origins if o.distribution == "reg-aaa")
    assert "nonsense" in str(origin.error)
    registry.announce("step_finished", record=None)
    assert registry.warnings == []


def test_a_generator_that_raises_halfway_registers_nothing(install: Install, tmp_path: Path) -> None:
    source = executor("half").replace("    yield Mine()\n", "    yield Mine()\n    raise RuntimeError('out of luck')\n")
    # The observer was taken in before the generator ran; it must not stay either.
    source += (
        "\n@hookimpl\ndef register_datasets():\n    return []\n\n@hookimpl\ndef step_finished(record):\n    1 / 0\n"
    )
    install("reg-half", "reg_half", source)
    registry = load_plugins()
    assert own(registry) == set()
    registry.announce("step_finished", record=None)
    assert registry.warnings == []
    with pytest.raises(UserError, match="did not load: RuntimeError: out of luck"):
        registry.find(Executor, "reg-half", "--executor")


def test_task_folders_and_conflicts_of_a_plugin_that_breaks_later_are_taken_back(
    install: Install, tmp_path: Path
) -> None:
    (tmp_path / "tasks").mkdir()
    source = executor("same") + (
        f"\n@hookimpl\ndef register_tasks():\n    yield {str(tmp_path / 'tasks')!r}\n    yield 'no/such/folder'\n"
    )
    install("reg-alpha", "reg_alpha", executor("same"))
    install("reg-beta", "reg_beta", source)
    registry = load_plugins()
    assert [folder.path for folder in registry.task_folders if folder.owner == "reg-beta"] == []
    assert registry.problems == []
    with pytest.raises(
        UserError, match=r"NotADirectoryError: register_tasks\(\) names no/such/folder, which is not a folder"
    ):
        registry.find(Executor, "reg-beta", "--executor")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            executor().replace("yield Mine()", "yield Mine"),
            "register_executors() yielded the class Mine; yield an instance",
        ),
        (executor().replace("yield Mine()", "yield 7"), "register_executors() yielded int, which is no Executor"),
        (executor().replace("yield Mine()", "pass"), "register_executors() returned None; yield or return the plugins"),
        (executor(name=""), "Mine has no name"),
        (executor(contract=99), "was written for contract 99; this harness has 2. Update harness."),
        (executor(contract=0), "was written for contract 0; this harness has 2. Update the plugin."),
    ],
)
def test_what_a_hook_yields_is_checked(install: Install, source: str, said: str) -> None:
    install("reg-odd", "reg_odd", source)
    with pytest.raises(UserError) as caught:
        load_plugins().find(Executor, "reg-odd", "--executor")
    assert said in text_of(caught)


def test_a_hook_may_have_another_function_name(install: Install) -> None:
    source = executor("reg_mine").replace(
        "@hookimpl\ndef register_executors", '@hookimpl(specname="register_executors")\ndef mine'
    )
    install("reg-spec", "reg_spec", source)
    assert own(load_plugins()) == {("executor", "reg_mine")}


def test_an_unknown_name_is_answered_with_the_nearest(install: Install) -> None:
    install("reg-good", "reg_good", executor("reg_mine"))
    with pytest.raises(UserError) as caught:
        load_plugins().find(Executor, "reg_mien", "--executor")
    assert text_of(caught) == (
        "--executor: unknown executor 'reg_mien'\n  Did you mean 'reg_mine'? All: `harness plugins`."
    )


def test_a_heavy_import_is_said_and_the_plugin_works(install: Install, tmp_path: Path) -> None:
    """In a fresh process, with a stand-in for torch: this one may have the real one loaded already."""
    install("reg-heavy", "reg_heavy", "import torch\n" + executor("reg_mine"))
    (tmp_path / "site" / "torch.py").write_text("")
    code = (
        "from harness.contracts.registry import load_plugins\n"
        "r = load_plugins()\n"
        "(o,) = (o for o in r.origins if o.name == 'reg_heavy')\n"
        "print(o.heavy, ('executor', 'reg_mine') in r.entries, *r.warnings)"
    )
    path = [str(tmp_path / "site"), *sys.path]
    child = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {path!r}\n{code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert child.stdout.startswith("('torch',) True plugin reg-heavy (entry point reg_heavy) imports torch at load (")
    assert child.stdout.endswith("Move heavy imports into methods.\n")


def test_an_observer_that_raises_is_named_and_changes_nothing(install: Install) -> None:
    hook = "\n@hookimpl\ndef step_finished(record):\n"
    install("reg-sour", "reg_sour", executor("a") + hook + "    raise KeyError(record['id'])\n")
    install("reg-sweet", "reg_sweet", executor("b") + hook + "    record['seen'] = True\n    return 'ignored'\n")
    registry = load_plugins()
    record: dict[str, object] = {"id": "x1"}
    registry.announce("step_finished", record=record)
    assert record == {"id": "x1", "seen": True}
    assert registry.warnings == ["observer 'reg-sour (entry point reg_sour)' raised in step_finished: KeyError: 'x1'"]


def test_a_loose_file_is_loaded_with_the_modules_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "methods"
    folder.mkdir()
    (folder / "reg_sibling.py").write_text("NAME = 'from_sibling'\n")
    (folder / "reg_later.py").write_text("VALUE = 41 + 1\n")
    source = "import reg_sibling\n" + executor("placeholder").replace('"placeholder"', "reg_sibling.NAME")
    # A sibling may be heavy, so it may be imported inside a method.
    source = source.replace(
        "        return InProcessPool(context)",
        "        import reg_later\n        return reg_later.VALUE",
    )
    (folder / "loose_one.py").write_text(source)
    registry = load_plugins([folder / "loose_one.py"])
    entry = registry.registered(Executor, "from_sibling", "--executor")
    assert entry.origin.loose == (folder / "loose_one.py").resolve()
    assert entry.origin.title == str((folder / "loose_one.py").resolve())
    assert isinstance(entry.plugin, Executor)
    assert entry.plugin.open(entry.plugin.Config(), None) == 42  # type: ignore[arg-type]


def test_a_loose_file_against_an_installed_plugin_of_that_name(install: Install, tmp_path: Path) -> None:
    install("reg-good", "reg_good", executor("reg_mine"))
    file = tmp_path / "mine.py"
    file.write_text(executor("reg_mine"))
    with pytest.raises(UserError, match="executor 'reg_mine' is also offered by reg-good"):
        load_plugins([file])


def test_importing_the_registry_imports_nothing_heavy() -> None:
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "import harness.contracts.registry, harness.contracts.scaffold, harness.steps.store, harness.steps.provenance\n"
        "import harness.testing\n"
        "print([m for m in harness.contracts.registry.HEAVY if m in sys.modules])"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout == "[]\n"
