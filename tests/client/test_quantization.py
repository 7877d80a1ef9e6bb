"""What a QuantizationSpec selects and refuses, and pushes of fp8 from one rank and from several."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import rows, same_error, same_report
from reference import Agent
from test_push import Make, arrived
from torch import nn

from weightsync.errors import InputError, ManifestError, NonFiniteError, RankFailedError
from weightsync.manifest import TensorSpec
from weightsync.quantize import quantize
from weightsync.slab import ALIGN_NBYTES
from weightsync.transport.inmemory import Fabric, InMemoryTransport
from weightsync_client import ModuleSource, QuantizationSpec, StateDictSource
from weightsync_client.quantized import QuantizedSource

GUIDE = Path(__file__).parents[2] / "docs" / "trainers.md"
CONFIG = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}


def specs(*names: str, dtype: str = "bfloat16") -> list[TensorSpec]:
    return [TensorSpec(name, dtype, (256, 128)) for name in names]


def as_fp8(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a checkpoint of these matrices has."""
    made = {}
    for name, tensor in tensors.items():
        made[name], made[f"{name}_scale_inv"] = quantize(tensor)
    return made


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """No border of three ranks is one of blocks."""
    torch.manual_seed(0)
    return {f"{n}.weight": torch.randn(200, 150, dtype=torch.bfloat16) for n in "ab"}


# ------------------------------------------------------------------ what is selected


def test_embeddings_heads_routers_vectors_and_integers_stay_as_they_are() -> None:
    given = [
        *specs("model.embed_tokens.weight", "lm_head.weight", "x.mlp.gate.weight", "x.up.weight"),
        *specs("x.codes.weight", dtype="int8"),
        *specs("x.up.table"),
        TensorSpec("x.norm.weight", "bfloat16", (256,)),
    ]
    assert QuantizationSpec().select(given) == {"x.up.weight"}


def test_include_replaces_the_default_and_exclude_takes_away_from_it() -> None:
    given = specs("lm_head.weight", "x.q.weight", "x.k.weight")
    assert QuantizationSpec(include=("lm_head*", "*.q.*")).select(given) == {
        "lm_head.weight",
        "x.q.weight",
    }
    assert QuantizationSpec(exclude=("*.q.*",)).select(given) == {"x.k.weight"}


def test_modules_to_keep_are_ends_of_paths_not_parts_of_names() -> None:
    spec = QuantizationSpec.from_config(
        {"quantization_config": CONFIG | {"modules_to_not_convert": ["mlp.down"]}}
    )
    given = specs("0.mlp.down.weight", "0.mlp.down.deep.weight", "0.mlp.down2.weight")
    assert spec.select(given) == {"0.mlp.down2.weight"}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({}, "quant_method is 'not set'"),
        ({"quantization_config": None}, "quant_method is 'not set'"),
        (CONFIG | {"quant_method": "awq"}, "quant_method is 'awq', not 'fp8'"),
        (CONFIG | {"weight_block_size": [64, 128]}, "weight_block_size is [64, 128]"),
        (CONFIG | {"weight_block_size": None}, "weight_block_size is None"),
        (CONFIG | {"fmt": "e5m2"}, "fmt is 'e5m2'"),
        (CONFIG | {"activation_scheme": "static"}, "activation_scheme is 'static'"),
        (CONFIG | {"scale_fmt": "ue8m0"}, "scale_fmt is 'ue8m0'"),
    ],
)
def test_a_config_of_another_kind_is_refused_with_what_it_says(
    config: dict[str, Any], told: str
) -> None:
    with pytest.raises(InputError) as error:
        QuantizationSpec.from_config(config)
    assert told in str(error.value)


@pytest.mark.parametrize("field", ["include", "exclude", "keep_modules"])
@pytest.mark.parametrize("given", ["*.weight", ("",), (3,)])
def test_patterns_are_a_list_of_names(field: str, given: Any) -> None:
    with pytest.raises(InputError, match=field):
        QuantizationSpec(**{field: given})


def test_a_scale_that_is_there_already_is_refused(weights: dict[str, torch.Tensor]) -> None:
    taken = weights | {"a.weight_scale_inv": torch.ones(2, 2)}
    with pytest.raises(ManifestError, match=r"a\.weight_scale_inv"):
        QuantizedSource(StateDictSource(taken), QuantizationSpec())


# ------------------------------------------------------------------ pushes


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("rounds", [False, True])
def test_the_engine_gets_what_a_checkpoint_of_fp8_has(
    ranks: int, rounds: bool, agent: Agent, make_job, weights: dict[str, torch.Tensor]
) -> None:
    """With and without a bound on the slots; every push has other amaxes.

    The third one's rendezvous comes after the ranks have told each other of cut blocks.
    """
    options = {"max_slot_bytes": 4 * ALIGN_NBYTES} if rounds else {}
    job = make_job(agent, ranks=ranks, quantization=QuantizationSpec(), **options)
    for push in range(4):
        for publisher in job.publishers if push == 2 else ():
            publisher._held.end_session()
        cut = {name: rows(tensor, ranks) for name, tensor in weights.items()}
        report = same_report(
            job.push([{name: parts[r] for name, parts in cut.items()} for r in range(ranks)])
        )
        assert (report.rounds > 1) == rounds
        assert arrived(agent, as_fp8(weights))
        for tensor in weights.values():
            tensor.mul_(torch.rand(tensor.shape) * 3)
    assert agent.calls.count("/init_transfer") == 2


def test_weights_of_a_known_form_are_quantised_as_they_are_now(
    agent: Agent, make_publisher: Make
) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(130, 140), "norm": nn.LayerNorm(8)}).bfloat16()
    publisher = make_publisher(agent, quantization=QuantizationSpec(), zero_copy_bytes=0)
    declared = []
    for push in range(5):
        if push == 3:  # elsewhere, and as a parameter of its own
            model["a"].weight.data = torch.randn(140, 130).bfloat16()
            model["norm"].weight = nn.Parameter(torch.randn(8).bfloat16())
        publisher.push(model)
        state = model.state_dict()
        assert arrived(agent, {**state, **as_fp8({"a.weight": state["a.weight"]})})
        declared.append(publisher._held.session.declaration)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(torch.rand(parameter.shape) * 3)
    assert declared[2] is declared[3] is declared[4]
    assert agent.calls.count("/init_transfer") == 1
    model["a"].weight.data = torch.randn(130, 140).bfloat16().T  # of another form
    publisher.push(model)
    assert arrived(agent, as_fp8({"a.weight": model["a"].weight.detach()}))


def test_what_is_not_quantised_is_written_from_where_it_is(
    agent: Agent, make_publisher: Callable[..., Any], weights: dict[str, torch.Tensor]
) -> None:
    """Once it lies elsewhere it is copied: the bytes are those of that moment in every push."""
    embeddings = torch.randn(400, 150).bfloat16()
    given = {**weights, "embed_tokens.weight": embeddings}
    publisher = make_publisher(agent, quantization=QuantizationSpec(), zero_copy_bytes=1024)
    for push in range(3):
        if push == 2:
            given["embed_tokens.weight"] = embeddings = torch.randn(400, 150).bfloat16()
        publisher.push(given)
        session = publisher._held.session
        assert session is not None
        lent = {name for name, _ in session.slots._loan.lent}
        assert lent == ({"embed_tokens.weight"} if push < 2 else set())
        assert arrived(agent, {**as_fp8(weights), "embed_tokens.weight": embeddings})
        for tensor in given.values():
            tensor.mul_(torch.rand(tensor.shape) * 3)


def test_tied_matrices_are_quantised_once(agent: Agent, make_publisher: Make) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(130, 140, bias=False), "b": nn.Linear(130, 140, False)})
    model["b"].weight = model["a"].weight
    manifest = {
        t.name: t for t in QuantizedSource(ModuleSource(model), QuantizationSpec()).manifest()
    }
    assert manifest["b.weight"].alias_of == "a.weight"
    assert manifest["b.weight_scale_inv"].alias_of == "a.weight_scale_inv"
    report = make_publisher(agent, quantization=QuantizationSpec()).push(model)
    wanted = as_fp8({"a.weight": model["a"].weight.detach()})
    assert arrived(agent, wanted)
    assert report.nbytes == sum(t.nbytes for t in wanted.values())


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_pattern_that_no_rank_has_a_matrix_for_is_refused_with_near_names(
    ranks: int, agent: Agent, make_job, weights: dict[str, torch.Tensor]
) -> None:
    """One rank alone need not have a matrix for each pattern: stages have different ones."""
    stages = [{name: t} for name, t in weights.items()] + [{}]
    given = [weights] if ranks == 1 else stages
    job = make_job(agent, ranks=ranks, quantization=QuantizationSpec(include=("a.*", "b.wieght")))
    error = same_error(job.push(given), ManifestError, 0)
    assert "b.wieght" in str(error)
    assert "b.weight" in str(error.hint)
    assert "/init_transfer" not in agent.calls
    good = make_job(agent, ranks=ranks, quantization=QuantizationSpec(include=("a.*", "b.*")))
    same_report(good.push(given))
    assert arrived(agent, as_fp8(weights))


def test_the_guides_example_pushes_what_the_engines_config_says(
    agent: Agent,
    weights: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fabric: Fabric,
) -> None:
    (code,) = re.findall(r"```python\n(import json\n.*?)```", GUIDE.read_text(), re.DOTALL)
    config = {"quantization_config": CONFIG | {"modules_to_not_convert": ["b"]}}
    (tmp_path / "MODEL").mkdir()
    (tmp_path / "MODEL" / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "weightsync_client.publisher.make_nixl", lambda: InMemoryTransport(fabric, "trainer")
    )
    names: dict[str, Any] = {"agents": [agent.url]}
    exec(code, names)  # noqa: S102
    with names["publisher"] as publisher:
        publisher.push(weights)
    kept = {"b.weight": weights["b.weight"]}
    assert arrived(agent, as_fp8({"a.weight": weights["a.weight"]}) | kept)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [0, 199])
def test_a_value_that_is_not_finite_in_one_shard_is_refused_on_all_ranks(
    value: float, row: int, agent: Agent, make_job, weights: dict[str, torch.Tensor]
) -> None:
    weights["a.weight"][row, 3] = value
    cut = {name: rows(tensor, 3) for name, tensor in weights.items()}
    shards = [{name: parts[r] for name, parts in cut.items()} for r in range(3)]
    job = make_job(agent, ranks=3, quantization=QuantizationSpec())
    results = job.push(shards)
    assert [type(r) for r in results] == [NonFiniteError] * 3, results
    assert any("a.weight" in t["tensor"] for t in results[0].context["tensors"])
    assert "/pause" not in agent.calls
    weights["a.weight"][row, 3] = 1
    same_report(job.push(shards))
    assert arrived(agent, as_fp8(weights))


@pytest.mark.parametrize("culprit", [0, 2])
def test_one_rank_that_fails_while_it_looks_for_scales_fails_all(
    culprit: int,
    agent: Agent,
    make_job,
    weights: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """WS-5: the others wait for its amax in a meeting that ends for all of them."""
    cut = {name: rows(tensor, 3) for name, tensor in weights.items()}
    shards = [{name: parts[r] for name, parts in cut.items()} for r in range(3)]
    job = make_job(agent, ranks=3, quantization=QuantizationSpec())
    same_report(job.push(shards))
    del agent.calls[:]
    seen = shards[culprit]["a.weight"].tensor.data_ptr()
    find: Callable[..., Any] = QuantizedSource.values

    def broken(self: QuantizedSource, key: Any) -> torch.Tensor:
        values: torch.Tensor = find(self, key)
        if values.data_ptr() == seen:
            raise torch.OutOfMemoryError("no memory for a strip")
        return values

    with monkeypatch.context() as patch:
        patch.setattr(QuantizedSource, "values", broken)
        error = same_error(job.push(shards), RankFailedError, culprit)
    assert "no memory for a strip" in str(error)
    assert error.context["phase"] == "scales"
    assert agent.calls == ["/status"]
    same_report(job.push(shards))
    assert arrived(agent, as_fp8(weights))
