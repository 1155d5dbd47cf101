"""`fedamole merge` on LoRA folders that PEFT wrote: what PEFT loads afterwards, and what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedamole.errors import ConfigError, RunError
from fedamole.merging.low_rank import with_all_modules
from fedamole.model.base import BUNDLED, locate
from fedamole.model.lora_files import read_lora

BASE = Path(locate(BUNDLED, Path.cwd()))
IDS = torch.tensor([[5, 40, 33, 90, 101, 7, 60]])
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def plain(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def written(folder: Path, base: Path = BASE, seed: int = 0, **settings: Any) -> Path:
    """A LoRA folder as PEFT writes it after training: neither A nor B is zero."""
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], **settings}
    torch.manual_seed(seed)
    model = get_peft_model(plain(base), LoraConfig(task_type=TaskType.CAUSAL_LM, init_lora_weights=False, **settings))
    model.save_pretrained(folder)
    return folder


def changes(base: Path, *folders: Path) -> list[dict[str, Tensor]]:
    """Each folder's change of every weight, by PEFT: the merged weights minus those of the base."""
    before = {name: weight.clone() for name, weight in plain(base).state_dict().items()}
    results = []
    for folder in folders:
        model = PeftModel.from_pretrained(plain(base), folder).merge_and_unload()
        results.append({name: weight - before[name] for name, weight in model.state_dict().items()})
    return results


def check_mean(base: Path, merged: Path, *folders: Path) -> None:
    """The merged model's weights are the base plus the mean of the folders' changes, and so are its logits."""
    *parts, actual = changes(base, *folders, merged)
    mean = {name: torch.stack([part[name] for part in parts]).mean(0) for name in actual}
    assert any(change.abs().max() > 1e-2 for change in mean.values())
    for name, change in mean.items():
        torch.testing.assert_close(actual[name], change, atol=1e-5, rtol=1e-5)
    expected = plain(base)
    expected.load_state_dict({name: weight + mean[name] for name, weight in expected.state_dict().items()})
    with torch.no_grad():
        logits = PeftModel.from_pretrained(plain(base), merged)(IDS).logits
        torch.testing.assert_close(logits, expected(IDS).logits, atol=1e-4, rtol=1e-4)


def merge(fedamole: Any, *arguments: object) -> Any:
    result = fedamole("merge", *arguments, "--out", "merged")
    assert result.code == 0, result.err
    return result


def test_ranks_scalings_and_modules_may_differ(tmp_path: Path, fedamole: Any) -> None:
    """Ranks by pattern, rank-stabilised scaling, targets named in three ways; a rank of 2 + 4 + 2 holds all."""
    first = written(tmp_path / "first", r=2, lora_alpha=3, rank_pattern={"layers.0.self_attn.q_proj": 1})
    second = written(tmp_path / "second", seed=1, r=4, use_rslora=True, alpha_pattern={r".*\.1\..*": 9})
    third = written(tmp_path / "third", seed=2, target_modules=r".*\.(up_proj|v_proj)")
    result = merge(fedamole, first, second, third, "--recipe", "svd", "--rank", 8)
    assert result.line == "merged: rank 8, of 3 models; no validation loss, as the clients' data are not known of " + (
        "adapter folders"
    )
    assert f"no base_identity.json in {first}, {second}, {third}: only names and sizes of the layers show" in result.err
    check_mean(BASE, tmp_path / "merged", first, second, third)
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["losses"] == {}
    answer = fedamole("generate", "merged", "Hello", "--max-new-tokens", 2)
    assert answer.code == 0, answer.err
    assert "--set applies a template by its columns" in answer.err


def test_the_example_of_the_documentation(tmp_path: Path, fedamole: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "merge.md").read_text()
    script, command = re.search(r"```python\n(.*?)```\n\n```bash\nfedamole (.*?) +#.*?```", page, re.S).groups()  # type: ignore[union-attr]
    exec(script, {})
    assert fedamole(*command.split()).code == 0
    check_mean(BASE, tmp_path / "merged", tmp_path / "lora-a", tmp_path / "lora-b")


def test_gpt2_stores_its_weights_transposed(folder: Callable[[str], Path], tmp_path: Path, fedamole: Any) -> None:
    base = folder("gpt2")
    settings: dict[str, Any] = {"base": base, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    first, second = written(tmp_path / "a", **settings), written(tmp_path / "b", seed=1, r=3, **settings)
    assert json.loads((first / CONFIG).read_text())["fan_in_fan_out"]
    merge(fedamole, first, second, "--recipe", "svd", "--rank", 5)
    check_mean(base, tmp_path / "merged", first, second)


def test_linear_is_the_mean_where_modules_do_not_overlap(tmp_path: Path, fedamole: Any) -> None:
    """A module that one folder lacks has change zero there, and the A of the other."""
    first = written(tmp_path / "a", target_modules=["q_proj"])
    second = written(tmp_path / "b", seed=1, target_modules=["v_proj"])
    merge(fedamole, first, second, "--recipe", "linear")
    check_mean(BASE, tmp_path / "merged", first, second)


@pytest.mark.parametrize(("recipe", "weight"), [("svd", 1 / 2), ("linear", 1 / 4)])
def test_the_change_is_that_of_peft(recipe: str, weight: float, tmp_path: Path, fedamole: Any) -> None:
    """PEFT's linear has sqrt(weight) in A and in B, and sums; means of both factors are its weights of 1/4."""
    first, second = written(tmp_path / "a"), written(tmp_path / "b", seed=1)
    merge(fedamole, first, second, "--recipe", recipe)
    model = PeftModel.from_pretrained(plain(BASE), first, adapter_name="a")
    model.load_adapter(second, adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [weight, weight], "peft", combination_type=recipe)
    model.load_adapter(tmp_path / "merged", adapter_name="ours")
    layers = [layer for layer in model.modules() if "ours" in getattr(layer, "lora_A", ())]
    assert len(layers) > 4
    for layer in layers:
        theirs = layer.get_delta_weight("peft")
        torch.testing.assert_close(layer.get_delta_weight("ours"), theirs, atol=1e-5, rtol=1e-5)
        assert theirs.abs().max() > 1e-2


def test_a_folder_of_fedamole_and_one_of_peft(runs: Any, tiny: Path, tmp_path: Path, fedamole: Any) -> None:
    """The base's identity is compared where it is stored; both folders name the same folder in different ways."""
    own = runs("local_only", "federation.rounds=1", "training.local_steps=6") / "clients" / "mood" / "adapter"
    other = written(tmp_path / "other", tiny / "base", target_modules=["q_proj", "down_proj"])
    config = json.loads((other / CONFIG).read_text())
    (tmp_path / "link").symlink_to(tiny / "base")
    (other / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "./link"}))
    result = merge(fedamole, own, other, "--recipe", "svd", "--rank", 4)
    assert f"no base_identity.json in {other}: only" in result.err
    check_mean(tiny / "base", tmp_path / "merged", own, other)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two equal folders; read them, do not write to them."""
    root = tmp_path_factory.mktemp("pair")
    first = written(root / "a")
    return first, Path(shutil.copytree(first, root / "b"))


def changed(pair: tuple[Path, Path], target: Path, **settings: Any) -> Path:
    """A copy of the second folder with other settings."""
    shutil.copytree(pair[1], target)
    config = json.loads((target / CONFIG).read_text())
    (target / CONFIG).write_text(json.dumps({**config, **settings}))
    return target


@pytest.mark.parametrize(
    ("settings", "error", "reason"),
    [
        ({"use_dora": True}, ConfigError, r"'use_dora' is True: DoRA .* train the adapter again without 'use_dora'"),
        ({"bias": "all"}, ConfigError, r"'bias' is 'all': the biases of the base are trained too"),
        ({"modules_to_save": ["lm_head"]}, ConfigError, r"'modules_to_save' is \['lm_head'\]: whole modules"),
        ({"lora_bias": True}, ConfigError, "'lora_bias' is True: B has a bias"),
        ({"trainable_token_indices": [3]}, ConfigError, "embeddings are trained too"),
        ({"megatron_config": {"x": 1}}, ConfigError, "'megatron_config' is .*: this setting is not known here"),
        ({"from_the_future": 1}, ConfigError, "'from_the_future' is 1: this setting is not known here"),
        ({"init_lora_weights": "pissa_niter_4"}, ConfigError, "also changes the base. Convert .*path_initial_model"),
        (
            {"peft_type": "LOHA"},
            ConfigError,
            "of the type 'LOHA', and only LoRAs are merged: convert it with .*as_lora",
        ),
        ({"peft_type": "PREFIX_TUNING"}, ConfigError, "a soft prompt, which changes no weights"),
        ({"peft_type": "AMOLE"}, ConfigError, "no plain LoRA: export it as one first"),
        ({"task_type": "SEQ_CLS"}, ConfigError, "for the task 'SEQ_CLS', and only those of causal language models"),
        ({"r": 3}, RunError, "have the shapes .* gives it the rank 3; copy both files again"),
        ({"r": 0}, RunError, "no config of a LoRA: r is 0, expected a whole number from 1"),
        ({"lora_alpha": "many"}, RunError, "lora_alpha is 'many', expected a number"),
        ({"alpha_pattern": {"(a+)+b": 1}}, RunError, r"alpha_pattern has the pattern '\(a\+\)\+b', which may take too"),
        ({"rank_pattern": {"(": 1}}, RunError, r"rank_pattern has the invalid pattern '\('"),
        ({"rank_pattern": {"a b": 1}}, RunError, "rank_pattern is 'a b', expected a text"),
    ],
)
def test_configs_that_are_refused(
    settings: dict[str, Any], error: type[Exception], reason: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(error, match=reason):
        read_lora(changed(pair, tmp_path / "c", **settings))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    return folder


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        (lambda t: {**t, "base_model.model.lm_head.weight": torch.ones(2, 2)}, ConfigError, "holds .*lm_head.weight"),
        (lambda t: {name: value for name, value in t.items() if "0.self_attn.q_proj.lora_B" not in name}, RunError,
         "q_proj' has only one of A and B"),
        (lambda t: {name: value.double() for name, value in t.items()}, RunError, "is of F64; expected a matrix of"),
        (lambda t: {name: value[..., None].contiguous() for name, value in t.items()}, RunError, "expected a matrix"),
        (lambda t: {name: value * torch.nan for name, value in t.items()}, ConfigError, "holds NaN or infinity"),
        (lambda t: {}, RunError, "holds no LoRA"),
    ],
)  # fmt: skip
def test_weights_that_are_refused(
    change: Any, error: type[Exception], reason: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(error, match=reason):
        read_lora(rewrite(changed(pair, tmp_path / "c"), change))


def test_pickled_or_missing_or_damaged_weights(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = changed(pair, tmp_path / "c")
    (folder / WEIGHTS).write_bytes(b"something else")
    with pytest.raises(RunError, match=r"safetensors is damaged \(.*\); copy it again"):
        read_lora(folder)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(RunError, match=r"pickle file, which fedamole never reads. Convert it .*save_pretrained\("):
        read_lora(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(RunError, match=r"adapter_model.safetensors is missing; copy it again"):
        read_lora(folder)


def test_an_error_is_one_line_and_leaves_nothing(pair: tuple[Path, Path], tmp_path: Path, fedamole: Any) -> None:
    def error(*arguments: object) -> str:
        result = fedamole("merge", pair[0], *arguments, "--out", "merged")
        assert result.code in (2, 4, 5)
        assert not (tmp_path / "merged").exists()
        text: str = result.error
        return text

    second = pair[1]
    for recipe in ("regmean", "selective"):
        assert re.search(
            rf"--recipe {recipe} reads the clients' data, which are not known of {pair[0]}: name the run .* or use "
            "linear, svd, ties or dare",
            error(second, "--recipe", recipe),
        )
    dora = changed(pair, tmp_path / "dora", use_dora=True)
    assert "'use_dora' is True" in error(dora, "--recipe", "svd")
    linear = written(tmp_path / "four", r=4)
    assert "needs LoRAs of one rank, and these differ" in error(linear, "--recipe", "linear")
    (tmp_path / "link").symlink_to(second)
    assert "is named twice" in error(second, tmp_path / "link", "--recipe", "svd")


def test_the_base_must_be_one(pair: tuple[Path, Path], folder: Any, tmp_path: Path, fedamole: Any) -> None:
    def error(second: Path, *options: object) -> str:
        result = fedamole("merge", pair[0], second, "--recipe", "svd", "--out", "merged", *options)
        assert (result.code, (tmp_path / "merged").exists()) == (4, False)
        text: str = result.error
        return text

    key, number = "base_model_name_or_path", iter(range(9))

    def based_on(base: str | None, **more: Any) -> Path:
        return changed(pair, tmp_path / f"c{next(number)}", **{key: base}, **more)

    hub = based_on("someone/model")
    assert re.search(rf"a names the base {BASE}, and \S+ names someone/model: only LoRAs of one base", error(hub))
    assert "names no base: pass it with --base" in error(based_on(None))
    assert "names the version 'v2' of" in error(based_on(str(BASE), revision="v2"))
    away = based_on("/not/here")
    result = fedamole("merge", away, based_on("/not/here"), "--recipe", "svd", "--out", "merged")
    assert f"/not/here, the base of {away}, is not on this machine: pass a copy with --base" in result.error
    result = fedamole("merge", hub, based_on("someone/model"), "--recipe", "svd", "--out", "merged")
    assert re.search(
        r"'someone/model', the base that the run or the adapter names, is not .* pass --base", result.error
    )
    merge(fedamole, pair[0], hub, "--recipe", "svd", "--base", BASE)
    check_mean(BASE, tmp_path / "merged", *pair)


def test_a_lora_of_another_base(pair: tuple[Path, Path], folder: Any, tmp_path: Path, fedamole: Any) -> None:
    llama = folder("llama")

    def error(*arguments: object) -> str:
        result = fedamole("merge", pair[0], *arguments, "--recipe", "svd", "--out", "merged")
        assert (result.code, (tmp_path / "merged").exists()) == (4, False), result.err
        text: str = result.error
        return text

    assert re.search(
        r"which is no linear layer inside the base .*: name the right base", error(pair[1], "--base", llama)
    )
    small = rewrite(
        changed(pair, tmp_path / "small"),
        lambda t: {k: v[:, :1].contiguous() if "_A" in k else v for k, v in t.items()},
    )
    assert re.search(r"small is a LoRA of another base: its '.*q_proj' maps 1 values to \d+, and that", error(small))


def test_all_modules_by_hand() -> None:
    ones, threes = torch.ones(1, 2), torch.full((1, 2), 3.0)
    loras = {
        "x": {"m": (ones, torch.ones(4, 1))},
        "y": {"m": (threes, torch.ones(4, 1))},
        "z": {"n": (ones, torch.ones(2, 1))},
    }
    filled = with_all_modules(loras)
    assert {name: list(lora) for name, lora in filled.items()} == {name: ["m", "n"] for name in "xyz"}
    a, b = filled["z"]["m"]
    assert (a.tolist(), b.tolist()) == ([[2.0, 2.0]], [[0.0]] * 4)
    assert filled["x"]["m"] is loras["x"]["m"]
    ranks = with_all_modules({"x": loras["x"], "y": {"m": (torch.ones(2, 2), torch.ones(4, 2))}, "z": loras["z"]})
    assert not ranks["z"]["m"][0].any()
