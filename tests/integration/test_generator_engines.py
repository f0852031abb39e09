"""One contract, three engines (transformers, vLLM stepped in its process, vLLM asynchronous); then vLLM's own traps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlprm.engine.generator_vllm import VllmGenerator, VllmSettings, cpu_environment
from rlprm.engine.weights import Manifest, buckets, digest_of, free_port, make_group, named_weights, send
from rlprm.errors import ConfigError, StaleWeights, WorkerLost
from rlprm.roles import Prompt, Request, Rollout
from tests.integration import tiny_models
from tests.integration.generator_host import Host
from tests.integration.tiny_models import STOP, VOCABULARY

pytestmark = pytest.mark.integration

LENGTH = 384
HF = {"dtype": "float32", "device": "cpu", "max_model_len": LENGTH, "max_num_seqs": 8, "stop_token_ids": (STOP,)}
VLLM = {
    "dtype": "float32",
    "max_model_len": LENGTH,
    "max_num_seqs": 64,
    "kv_cache_bytes": 32 << 20,
    "gpu_memory_utilization": None,
    "tensor_parallel_size": 1,
    "enforce_eager": True,
    "prefix_caching": True,
    "seed": 0,
    "stop_token_ids": (STOP,),
}
SETTINGS = {"hf": HF, "vllm": VLLM, "async": VLLM}
PROBE = [[3, 14, 15, 92, 65, 35, 89, 79], [31, 41, 59], list(range(20, 80))]


def request(tokens: list[int], seeds: tuple[int, ...], temperature: float = 1.0, max_tokens: int = 24) -> Request:
    prompt = Prompt(id=f"test/{tokens[0]}", text="", question="", tokens=tuple(tokens), gold="", source="test")
    return Request(prompt=prompt, seeds=seeds, temperature=temperature, max_tokens=max_tokens)


def weights(seed: int, tied: bool) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor.detach()) for name, tensor in named_weights(tiny_models.model(seed, tied))]


def gap(engine: Any, seed: int, temperature: float) -> float:
    """max |log-prob of the engine - log-prob of the HF model| over the probe tokens, nats."""
    reference = tiny_models.model(seed, engine.tied)
    found = engine.host.call("logprobs", PROBE, temperature)
    assert all(row[0] == 0.0 and len(row) == len(tokens) for row, tokens in zip(found, PROBE, strict=True))
    return max(
        float((torch.tensor(row[1:]) - tiny_models.logprobs(reference, tokens, temperature)).abs().max())
        for row, tokens in zip(found, PROBE, strict=True)
    )


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """One process for all engines, one engine at a time: importing vLLM and transformers is the slow part."""
    child = Host(cpu_environment(1))
    yield child
    child.close()


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    return {tied: tiny_models.folder(tmp_path_factory.mktemp("models"), 0, tied) for tied in (True, False)}


@pytest.fixture(scope="module", params=["hf-tied", "async-untied", "vllm-untied", "vllm-tied"])
def engine(request: Any, host: Host, paths: dict[bool, str]) -> Any:
    kind, tying = request.param.split("-")
    return SimpleNamespace(host=host, kind=kind, tied=tying == "tied", path=paths[tying == "tied"])


@pytest.fixture
def fresh(engine: Any) -> Any:
    """The engine with the weights of seed 0, version 0."""
    engine.host.use(engine.kind, engine.path, SETTINGS[engine.kind])
    engine.host.call("load", 0, weights(0, engine.tied))
    return engine


@pytest.fixture
def tied(host: Host, paths: dict[bool, str]) -> Any:
    """vLLM in its process with a tied model."""
    host.use("vllm", paths[True], VLLM)
    return SimpleNamespace(host=host, tied=True, path=paths[True])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_logprobs_are_those_of_the_model_at_the_sampling_temperature(fresh: Any, temperature: float) -> None:
    requests = [request([1, 2, 3], (5, 6), temperature), request(list(range(10, 30)), (7,), temperature)]
    reference = tiny_models.model(0, fresh.tied)
    groups: list[list[Rollout]] = fresh.host.call("generate", requests)
    assert sorted(len(group) for group in groups) == [1, 2]
    for rollout in (rollout for group in groups for rollout in group):
        prompt = list(rollout.prompt.tokens)
        expected = tiny_models.logprobs(reference, prompt + list(rollout.tokens), temperature)[len(prompt) - 1 :]
        assert len(rollout.logprobs) == len(rollout.tokens)
        assert (torch.tensor(rollout.logprobs) - expected).abs().max() < 1e-4


def test_greedy_takes_the_most_likely_tokens_and_reports_logprobs_at_temperature_one(fresh: Any) -> None:
    ((rollout,),) = fresh.host.call("generate", [request([1, 2, 3], (0,), temperature=0.0)])
    reference = tiny_models.model(0, fresh.tied)
    tokens = [1, 2, 3, *rollout.tokens]
    with torch.no_grad():
        best = reference(input_ids=torch.tensor([tokens])).logits[0, 2:-1].argmax(-1)
    assert best.tolist() == list(rollout.tokens)
    expected = tiny_models.logprobs(reference, tokens, 1.0)[2:]
    assert (torch.tensor(rollout.logprobs) - expected).abs().max() < 1e-4


def test_a_seed_repeats_whatever_runs_beside_it_and_two_seeds_differ(fresh: Any) -> None:
    alone = fresh.host.call("generate", [request([1, 2, 3], (11,))])[0][0]
    crowd = [request([8, 9, 10, 11, 12, 13], (21, 22)), request([1, 2, 3], (11, 12, 11)), request([4, 5], (23,))]
    together = fresh.host.call("generate", crowd)
    (own,) = [group for group in together if group[0].prompt.tokens == (1, 2, 3)]
    assert own[0].tokens == alone.tokens == own[2].tokens
    assert own[1].tokens != own[0].tokens
    assert [(rollout.sample, rollout.seed) for rollout in own] == [(0, 11), (1, 12), (2, 11)]


def test_a_response_ends_at_a_stop_token_that_it_keeps_or_at_its_length(fresh: Any) -> None:
    groups = fresh.host.call("generate", [request([1, 2, 3], tuple(range(16)), max_tokens=60)])
    rollouts = groups[0]
    assert {rollout.finish for rollout in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        stopped = rollout.finish == "stop"
        assert (STOP in rollout.tokens) == stopped
        assert rollout.tokens.index(STOP) == len(rollout.tokens) - 1 if stopped else len(rollout.tokens) == 60


def test_rollouts_carry_the_version_of_the_last_load(fresh: Any) -> None:
    fresh.host.call("load", 41, weights(1, fresh.tied))
    groups = fresh.host.call("generate", [request([1, 2], (0, 1), max_tokens=2)])
    assert {rollout.version for rollout in groups[0]} == {41}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_after_a_load_the_engine_is_the_new_model(fresh: Any, temperature: float) -> None:
    assert gap(fresh, 0, temperature) < 1e-5
    digest = fresh.host.call("load", 1, weights(1, fresh.tied))
    assert digest == digest_of(weights(1, fresh.tied)) != digest_of(weights(0, fresh.tied))
    assert gap(fresh, 1, temperature) < 1e-5
    assert gap(fresh, 0, temperature) > 1e-2  # the probe can tell


def test_buckets_from_an_object_store_load_the_same_model(fresh: Any) -> None:
    named = weights(2, fresh.tied)
    packed = [bucket.numpy() for bucket in buckets(named, 10_000)]
    assert len(packed) > 5
    assert fresh.host.call("load_buckets", 2, Manifest.of(named), packed) == digest_of(named)
    assert gap(fresh, 2, 1.0) < 1e-5


def test_bf16_weights_arrive_with_all_their_bits(fresh: Any) -> None:
    named = [(name, tensor.to(torch.bfloat16)) for name, tensor in weights(4, fresh.tied)]
    packed = [bucket.numpy() for bucket in buckets(named, 10_000)]
    assert fresh.host.call("load_buckets", 4, Manifest.of(named), packed) == digest_of(named)
    rounded = tiny_models.model(4, fresh.tied)
    rounded.load_state_dict({name: tensor.bfloat16().float() for name, tensor in rounded.state_dict().items()})
    found = fresh.host.call("logprobs", PROBE[:1], 1.0)[0][1:]
    assert (torch.tensor(found) - tiny_models.logprobs(rounded, PROBE[0], 1.0)).abs().max() < 1e-5


def test_a_gloo_group_between_two_processes_loads_the_same_model(fresh: Any) -> None:
    port = free_port()
    named = weights(3, fresh.tied)
    fresh.host.post("join_group", "127.0.0.1", port, 1, 2, "gloo", 30.0)
    group = make_group("127.0.0.1", port, 0, 2, "gloo", 30.0)
    assert fresh.host.answer() == 1
    for digest in (True, False):  # twice through one group
        fresh.host.post("load_group", 3, Manifest.of(named), 10_000, digest)
        sent = send(group, named, 10_000, digest)
        assert fresh.host.answer() == sent == (digest_of(named) if digest else "")
    assert gap(fresh, 3, 1.0) < 1e-5
    assert fresh.host.call("version") == 3


def test_an_incomplete_or_foreign_set_of_names_is_refused_and_nothing_changes(fresh: Any) -> None:
    named = weights(1, fresh.tied)
    with pytest.raises(StaleWeights, match=r"1 missing \(model\.norm\.weight\)"):
        fresh.host.call("load", 9, [pair for pair in named if pair[0] != "model.norm.weight"])
    with pytest.raises(StaleWeights, match=r"1 unexpected \(model\.extra\)"):
        fresh.host.call("load", 9, [*named, ("model.extra", torch.zeros(2))])
    with pytest.raises(StaleWeights, match=r"model\.norm\.weight: \(3,\) instead of \(64,\)"):
        fresh.host.call("load", 9, [(n, torch.zeros(3) if n == "model.norm.weight" else t) for n, t in named])
    assert gap(fresh, 0, 1.0) < 1e-5
    assert fresh.host.call("version") == 0


def test_a_prompt_cached_under_old_weights_is_computed_again(fresh: Any) -> None:
    long = request([index % VOCABULARY for index in range(300)], (0,), temperature=0.0, max_tokens=8)
    fresh.host.call("generate", [long])
    fresh.host.call("load", 1, weights(1, fresh.tied))
    ((rollout,),) = fresh.host.call("generate", [long])
    tokens = [*long.prompt.tokens, *rollout.tokens]
    expected = tiny_models.logprobs(tiny_models.model(1, fresh.tied), tokens, 1.0)[299:]
    assert (torch.tensor(rollout.logprobs) - expected).abs().max() < 1e-4


def test_weights_do_not_change_in_the_middle_of_a_response(fresh: Any) -> None:
    requests = [request([1, 2], (0,), max_tokens=2), *(request([n], (1,), max_tokens=200) for n in range(3, 12))]
    message, *groups = fresh.host.call("load_while_running", 1, weights(1, fresh.tied), requests)
    assert "still running" in message
    assert len(groups) == len(requests)
    assert fresh.host.call("version") == 0


def test_every_engine_plays_the_role(fresh: Any) -> None:
    assert fresh.host.call("plays_the_role")


def test_closing_the_iterator_leaves_the_engine_free(fresh: Any) -> None:
    many = [request([1, 2], (0,), max_tokens=2), *(request([n], (1,), max_tokens=300) for n in range(3, 12))]
    assert len(fresh.host.call("close_half_way", many)) == 1
    assert fresh.host.call("load", 1, weights(1, fresh.tied))
    assert gap(fresh, 1, 1.0) < 1e-5


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request([1] * LENGTH, (0,)), "exceed max_model_len 384"),
        (request([1] * 380, (0,), max_tokens=5), "380 prompt tokens"),
        (request([VOCABULARY], (0,)), r"\[0, 100\)"),
        (request([1], (0,), temperature=0.001), "temperature 0.001"),
        (request([1], ()), "0 seeds"),
    ],
)
def test_a_request_that_cannot_be_run_as_it_is_is_refused(fresh: Any, bad: Request, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fresh.host.call("generate", [request([1, 2], (0,)), bad])
    with pytest.raises(ConfigError, match="1 to 383 ids"):
        fresh.host.call("logprobs", [[1] * LENGTH], 1.0)


def test_without_repacking_tied_weights_the_probe_fails(tied: Any) -> None:
    tied.host.call("load_without_repack", 1, weights(1, True))
    assert gap(tied, 1, 1.0) > 1e-3
    tied.host.call("load", 1, weights(1, True))
    assert gap(tied, 1, 1.0) < 1e-5


def test_without_resetting_the_prefix_cache_the_old_model_shows(tied: Any) -> None:
    # 300 tokens fill two of vLLM's CPU blocks of 128, so their keys are cached
    long = request([index % VOCABULARY for index in range(300)], (0,), temperature=0.0, max_tokens=8)
    tied.host.call("load", 0, weights(0, True))
    tied.host.call("generate", [long])
    tied.host.call("load_without_cache_reset", 1, weights(1, True))
    ((rollout,),) = tied.host.call("generate", [long])
    tokens = [*long.prompt.tokens, *rollout.tokens]
    expected = tiny_models.logprobs(tiny_models.model(1, True), tokens, 1.0)[299:]
    assert (torch.tensor(rollout.logprobs) - expected).abs().max() > 1e-2


def test_an_aborted_sample_is_never_returned_as_finished(tied: Any) -> None:
    requests = [request([1, 2], (0,), max_tokens=2), request([5], (1, 2), max_tokens=300)]
    first, second = tied.host.call("abort_last", requests)
    assert first[0].finish in ("stop", "length")
    assert second[0].finish in ("stop", "length")
    assert (second[1].finish, second[1].tokens, second[1].logprobs) == ("abort", (), ())


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_a_mended_engine_takes_another_load_and_samples_only_after_it(fresh: Any, part: float) -> None:
    for version in (2, 4):  # and it can be mended again
        with pytest.raises(Exception, match="no further bucket"):  # a child process passes on the words only
            fresh.host.call("load_broken_off", version, weights(version, fresh.tied), part)
        assert fresh.host.call("mend")
        with pytest.raises(StaleWeights, match="mixture of weights"):
            fresh.host.call("generate", [request([1], (0,))])
        fresh.host.call("load", version + 1, weights(version + 1, fresh.tied))
        assert gap(fresh, version + 1, 1.0) < 1e-5
    assert fresh.host.call("mend")  # nothing to do
    assert gap(fresh, 5, 0.6) < 1e-5


def test_a_load_that_broke_off_is_fatal_for_the_engine(tied: Any) -> None:
    with pytest.raises(StaleWeights, match="no further bucket"):
        tied.host.call("load_broken_off", 2, weights(2, True))
    for call in [("generate", [request([1], (0,))]), ("logprobs", [[1, 2]], 1.0), ("load", 3, weights(3, True))]:
        with pytest.raises(StaleWeights, match="restart the engine"):
            tied.host.call(*call)
    tied.host.start("vllm", tied.path, VLLM)  # a new engine in the same process works
    assert gap(tied, 0, 1.0) < 1e-5


def settings(**changed: Any) -> VllmSettings:
    return VllmSettings(**{**VLLM, **changed})


def test_memory_and_lengths_that_cannot_work_are_refused_before_vllm_starts(tmp_path: Path) -> None:
    path = tiny_models.folder(tmp_path, 0, True)
    # 2 (keys, values) * 2 layers * 1 head * 32 * 4 bytes = 512 bytes a token; 384 tokens: 196608
    with pytest.raises(ConfigError, match=r"kv_cache_bytes is 100000.* needs 196608 bytes \(512 per token\)"):
        VllmGenerator(path, settings(kv_cache_bytes=100_000))
    with pytest.raises(ConfigError, match="max_model_len is 1000; the model has 512 positions"):
        VllmGenerator(path, settings(max_model_len=1000))
    with pytest.raises(ConfigError, match=r"no config\.json"):
        VllmGenerator(str(tmp_path / "nowhere"), settings())
    with pytest.raises(ConfigError, match="exactly one"):
        settings(gpu_memory_utilization=0.5)


def test_what_vllm_itself_cannot_do_is_a_config_error(tied: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vLLM cannot start"):
        tied.host.start("vllm", tied.path, {**VLLM, "dtype": "float31"})
    tiny_models.model(0, True, heads=4).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="heads have 16 numbers"):
        tied.host.start("vllm", str(tmp_path), VLLM)
    tied.host.start("vllm", tied.path, VLLM)


@pytest.mark.parametrize("engine", ["async-untied"], indirect=True)
def test_the_death_of_the_engine_process_is_a_typed_error(fresh: Any) -> None:
    many = [request([1, 2], (0,), max_tokens=1), *(request([n], tuple(range(8)), max_tokens=300) for n in range(3, 40))]
    with pytest.raises(WorkerLost, match="engine process has ended"):
        fresh.host.call("generate_while_the_engine_dies", many)
    fresh.host.forget()
