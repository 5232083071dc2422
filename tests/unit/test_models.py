"""What runs and what is refused by name: keys, tensors, shapes and types of the architectures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from fomoe_io.errors import FormatError
from fomoe_io.models import ARCHITECTURES, Model, check_model
from fomoe_io.models.rope import yarn_rope
from fomoe_io.models.tensors import same_shape
from fomoe_io.storage.store import Store
from layout_tool.main import main
from tests.gguf_edit import Edit, Keys, Tensors, edited
from tests.reference_model import yarn
from tests.tiny_model import Tiny, write_tiny

F32 = gguf.GGMLQuantizationType.F32
SHAPES = {
    "qwen3moe": Tiny(architecture="qwen3moe", rotated=32, layers=2, vocabulary=260),
    "qwen35moe": Tiny(vocabulary=260),
}
OTHERS = {
    "qwen3next": Tiny(architecture="qwen3next", vocabulary=260),
    "minimax-m2": Tiny(architecture="minimax-m2", layers=2, vocabulary=260),
    "glm4moe": Tiny(architecture="glm4moe", dense_layers=1, layers=2, biased=True, vocabulary=260),
    "gpt-oss": Tiny(architecture="gpt-oss", layers=2, biased=True, rotated=32, vocabulary=260),
    "deepseek2": Tiny(architecture="deepseek2", layers=2, dense_layers=1, query_rank=24, vocabulary=260),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {name: write_tiny(directory / f"{name}.gguf", shape, 5) for name, shape in (SHAPES | OTHERS).items()}


@pytest.fixture
def check(models: dict[str, Path], tmp_path: Path) -> Callable[[str, Edit], Model]:
    """check_model of a model with a change."""

    def of(architecture: str, edit: Edit) -> Model:
        return check_model(Store.open(edited(models[architecture], tmp_path / "m.gguf", edit)))

    return of


def key(**values: Any) -> Edit:
    """Metadata of the architecture, `__` for a point; None takes a key away."""

    def edit(keys: Keys, tensors: Tensors) -> None:
        for name, value in values.items():
            whole = f"{keys['general.architecture']}.{name.replace('__', '.')}"
            keys[whole] = value
            if value is None:
                del keys[whole]

    return edit


def extra(name: str, *shape: int) -> Edit:
    """One more tensor."""

    def edit(keys: Keys, tensors: Tensors) -> None:
        tensors[name] = np.zeros(shape, np.float32), F32

    return edit


def without(*names: str) -> Edit:
    def edit(keys: Keys, tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return edit


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    """Another array in a tensor's place."""

    def edit(keys: Keys, tensors: Tensors) -> None:
        tensors[name] = change(tensors[name][0]), F32

    return edit


def retyped(name: str, kind: str) -> Edit:
    def edit(keys: Keys, tensors: Tensors) -> None:
        tensors[name] = tensors[name][0].astype(kind), F32

    return edit


BOTH = {
    "a key of no equation here": (key(swiglu_limit=7.0), "swiglu_limit"),
    "a sliding window": (key(attention__sliding_window=128), "attention.sliding_window is 128"),
    "its pattern": (key(attention__sliding_window_pattern=[True, False]), "sliding_window_pattern"),
    "sigmoid gating": (key(expert_gating_func=2), "expert_gating_func is 2"),
    "weights that do not sum 1": (key(expert_weights_norm=False), "expert_weights_norm is False"),
    "groups of experts": (key(expert_group_count=4), "expert_group_count is 4"),
    "a scale of attention": (key(attention__scale=0.5), "attention.scale is 0.5"),
    "soft-capped logits": (key(final_logit_softcapping=30.0), "final_logit_softcapping"),
    "dense layers": (key(leading_dense_block_count=1), "leading_dense_block_count"),
    "attention both ways": (key(attention__causal=False), "attention.causal"),
    "a long-context rope": (key(rope__scaling__type="longrope"), "'longrope', expected none, linear or yarn"),
    "another beta": (key(rope__scaling__yarn_beta_fast=16.0), "yarn_beta_fast is 16"),
    "a negative factor": (key(rope__scaling__factor=-4.0), "rope.scaling.factor is -4"),
    "a factor in words": (key(rope__scaling__factor="four"), "rope.scaling.factor is 'four'"),
    "heads of other layers": (key(attention__head_count=[4]), "1 entries for"),
    "heads that do not divide": (key(attention__head_count_kv=3), "no multiple of head_count_kv 3"),
    "no heads": (key(attention__head_count=0), "attention.head_count is 0"),
    "heads of no columns": (key(attention__key_length=0), "attention.key_length is 0"),
    "values of another width": (key(attention__value_length=64), "attention.value_length"),
    "values of the default width": (key(attention__value_length=None), "attention.value_length"),
    "an odd rotation": (key(rope__dimension_count=15), "dimension_count is 15, expected an even number"),
    "no rotation": (key(rope__dimension_count=0), "dimension_count is 0"),
    "no layers": (key(block_count=0), "block_count is 0"),
    "a layer too many": (key(block_count=5), "blk."),
    "more picks than experts": (key(expert_used_count=9), "expert_used_count 9 is more than expert_count 8"),
    "no experts": (key(expert_count=0), "expert_count is 0"),
    "an epsilon that is no number": (key(attention__layer_norm_rms_epsilon=float("nan")), "epsilon is nan"),
    "an epsilon of nothing": (key(attention__layer_norm_rms_epsilon=0.0), "epsilon is 0.0"),
    "a size as text": (key(embedding_length="64"), "embedding_length is '64'"),
    "a size as a flag": (key(context_length=True), "context_length is True"),
    "a size as a fraction": (key(expert_count=8.0), "expert_count is 8.0"),
    "rope factors": (extra("rope_freqs.weight", 16), "tensor rope_freqs.weight"),
    "a bias of the output": (extra("output.bias", 260), "tensor output.bias"),
    "a bias of attention": (extra("blk.0.attn_output.bias", 64), "tensor blk.0.attn_output.bias"),
    "a bias of the router": (extra("blk.1.ffn_gate_inp.bias", 8), "tensor blk.1.ffn_gate_inp.bias"),
    "a bias of the experts": (extra("blk.1.ffn_up_exps.bias", 8, 32), "tensor blk.1.ffn_up_exps.bias"),
    "a selection bias": (extra("blk.0.exp_probs_b.bias", 8), "tensor blk.0.exp_probs_b.bias"),
    "a scale of a product": (extra("blk.0.attn_gate.scale", 1), "tensor blk.0.attn_gate.scale"),
    "attention sinks": (extra("blk.1.attn_sinks.weight", 4), "tensor blk.1.attn_sinks.weight"),
    "a block without a number": (extra("blk.", 4), "tensor blk."),
    "a block with a name": (extra("blk.x.attn_norm.weight", 64), "tensor blk.x.attn_norm.weight"),
    "a block of two digits": (extra("blk.01.attn_norm.weight", 64), "tensor blk.01.attn_norm.weight"),
    "experts of two digits": (extra("blk.01.ffn_gate_exps.weight", 8, 32, 64), "tensor blk.01.ffn_gate_exps.weight"),
    "a block beyond": (extra("blk.7.attn_norm.weight", 64), "tensor blk.7.attn_norm.weight"),
    "a block number beyond all": (extra("blk.99999999999.foo", 4), "tensor blk.99999999999.foo"),
    "no norm": (without("blk.1.attn_norm.weight"), "no tensor blk.1.attn_norm.weight"),
    "no router": (without("blk.0.ffn_gate_inp.weight"), "no tensor blk.0.ffn_gate_inp.weight"),
    "no embedding": (without("token_embd.weight"), "no tensor token_embd.weight"),
    "a router turned": (changed("blk.0.ffn_gate_inp.weight", lambda a: a.T.copy()), r"\[8, 64\], expected \[64, 8\]"),
    "a norm as a row": (changed("blk.0.attn_norm.weight", lambda a: a.reshape(64, 1)), r"\[1, 64\], expected \[64\]"),
    "a norm folded": (changed("output_norm.weight", lambda a: a.reshape(8, 8)), r"\[8, 8\], expected \[64\]"),
    "a norm in double": (retyped("output_norm.weight", "f8"), "output_norm.weight has type F64"),
    "a norm of short integers": (retyped("blk.0.attn_norm.weight", "i2"), "attn_norm.weight has type I16"),
    "a norm of long integers": (retyped("blk.1.attn_norm.weight", "i8"), "attn_norm.weight has type I64"),
    "a router of integers": (retyped("blk.1.ffn_gate_inp.weight", "i4"), "ffn_gate_inp.weight has type I32"),
    "experts in double": (retyped("blk.0.ffn_up_exps.weight", "f8"), "expert up has type F64"),
}


@pytest.mark.parametrize("architecture", SHAPES)
@pytest.mark.parametrize("case", BOTH)
def test_refused_by_name(check: Callable[[str, Edit], Model], architecture: str, case: str) -> None:
    edit, expected = BOTH[case]
    with pytest.raises(FormatError, match=expected) as caught:
        check(architecture, edit)
    assert "\n" not in caught.value.message


ONE = {
    "heads that differ": ("qwen3moe", key(attention__head_count_kv=[2, 1]), "layers that differ"),
    "a bias that llama.cpp leaves out": ("qwen35moe", extra("blk.3.attn_q.bias", 256), "tensor blk.3.attn_q.bias"),
    "a bias of another length": ("qwen3moe", extra("blk.0.attn_q.bias", 64), r"\[64\], expected \[128\]"),
    "query beside the fused": ("qwen35moe", extra("blk.3.attn_qkv.weight", 384, 64), "tensor blk.3.attn_"),
    "a shared expert of no architecture": (
        "qwen3moe",
        extra("blk.0.ffn_gate_shexp.weight", 32, 64),
        "tensor blk.0.ffn_gate_shexp.weight",
    ),
    "a shared expert without its gate": (
        "qwen35moe",
        without("blk.2.ffn_gate_inp_shexp.weight"),
        "no tensor blk.2.ffn_gate_inp_shexp.weight",
    ),
    "a shared expert that is not there": (
        "qwen35moe",
        without(*(f"blk.{i}.ffn_{part}_shexp.weight" for i in range(4) for part in ("gate_inp", "gate", "up", "down"))),
        "no tensor blk.0.ffn_gate_inp_shexp.weight",
    ),
    "drafts without a draft": ("qwen35moe", key(nextn_predict_layers=1), "no blk.3.nextn.eh_proj.weight"),
    "drafts of experts alone": (
        "qwen35moe",
        lambda keys, tensors: (
            key(nextn_predict_layers=1)(keys, tensors),
            [tensors.pop(name) for name in list(tensors) if name.startswith("blk.3.") and "_exps" not in name],
        ),
        "no blk.3.nextn.eh_proj.weight",
    ),
    "drafts of another architecture": ("qwen3moe", key(nextn_predict_layers=1), "nextn_predict_layers is 1"),
    "all layers draft": ("qwen35moe", key(nextn_predict_layers=4), "nextn_predict_layers is 4"),
    "layers of a list too short": ("qwen35moe", key(attention__recurrent_layers=[True, False]), "2 entries for 4"),
    "layers in numbers": ("qwen35moe", key(attention__recurrent_layers=[1, 1, 1, 0]), "recurrent_layers"),
    "layers in words": ("qwen35moe", key(attention__recurrent_layers="all"), "recurrent_layers is 'all'"),
    "every zeroth layer": ("qwen35moe", key(full_attention_interval=0), "full_attention_interval is 0"),
    "sections that leave pairs out": ("qwen35moe", key(rope__dimension_sections=[2, 1, 1, 4]), "without a position"),
    "sections of nothing": ("qwen35moe", key(rope__dimension_sections=[0, 0, 0, 0]), "without a position"),
    "three sections": ("qwen35moe", key(rope__dimension_sections=[3, 3, 2]), "dimension_sections"),
    "states of another size": ("qwen35moe", key(ssm__inner_size=65), "inner_size 65"),
    "values no multiple of keys": ("qwen35moe", key(ssm__group_count=3), "group_count 3"),
    "a convolution turned": (
        "qwen35moe",
        changed("blk.0.ssm_conv1d.weight", lambda a: a.T.copy()),
        r"\[128, 4\], expected \[4, 128\]",
    ),
}


OF_OTHERS = {
    "a scale of no equation": ("qwen3next", key(attention__scale=0.5), "attention.scale is 0.5"),
    "alphas of their own": ("qwen3next", extra("blk.0.ssm_alpha.weight", 4, 64), "tensor blk.0.ssm_alpha.weight"),
    "both layouts": ("qwen3next", extra("blk.0.ssm_in.weight", 192, 64), "tensor blk.0.attn_"),
    "no gating": ("minimax-m2", key(expert_gating_func=None), "expert_gating_func"),
    "gating of another kind": ("minimax-m2", key(expert_gating_func=3), "expert_gating_func is 3"),
    "no output": ("minimax-m2", without("output.weight"), "no tensor output.weight"),
    "no bias of the choice": ("minimax-m2", without("blk.1.exp_probs_b.bias"), "no tensor blk.1.exp_probs_b.bias"),
    "norms of a head": ("minimax-m2", changed("blk.0.attn_q_norm.weight", lambda a: a[:32]), r"\[32\], expected"),
    "experts of another width": ("minimax-m2", key(feed_forward_length=96), "expected 8 of"),
    "a bias of query": ("minimax-m2", extra("blk.0.attn_q.bias", 128), "tensor blk.0.attn_q.bias"),
    "a shared expert's gate": (
        "glm4moe",
        extra("blk.1.ffn_gate_inp_shexp.weight", 1, 64),
        "tensor blk.1.ffn_gate_inp_shexp.weight",
    ),
    "no bias of the choice there": ("glm4moe", without("blk.1.exp_probs_b.bias"), "no tensor blk.1.exp_probs_b.bias"),
    "all layers dense": ("glm4moe", key(leading_dense_block_count=2), "leading_dense_block_count is 2"),
    "experts in a dense layer": ("glm4moe", extra("blk.0.exp_probs_b.bias", 8), "tensor blk.0.exp_probs_b.bias"),
    "sections of pictures": ("glm4moe", key(rope__dimension_sections=[4, 2, 2, 0]), "dimension_sections"),
    "groups": ("glm4moe", key(expert_group_count=2), "expert_group_count is 2"),
    "no window": ("gpt-oss", key(attention__sliding_window=None), "attention.sliding_window"),
    "a window of none": ("gpt-oss", key(attention__sliding_window=0), "attention.sliding_window is 0"),
    "no sinks": ("gpt-oss", without("blk.1.attn_sinks.weight"), "no tensor blk.1.attn_sinks.weight"),
    "no bias of experts": ("gpt-oss", without("blk.0.ffn_up_exps.bias"), "no tensor blk.0.ffn_up_exps.bias"),
    "a bias of other experts": (
        "gpt-oss",
        changed("blk.0.ffn_up_exps.bias", lambda a: a[:4]),
        r"\[32, 4\], expected \[32, 8\]",
    ),
    "no output there": ("gpt-oss", without("output.weight"), "no tensor output.weight"),
    "no rank of queries": ("deepseek2", key(attention__q_lora_rank=None), "attention.q_lora_rank"),
    "no latent": ("deepseek2", key(attention__kv_lora_rank=0), "attention.kv_lora_rank is 0"),
    "no columns of a query": ("deepseek2", key(attention__key_length_mla=16), "attention.key_length_mla is 16"),
    "values that are no latents": ("deepseek2", key(attention__value_length=16), "attention.value_length"),
    "keys without what turns": ("deepseek2", key(attention__key_length=32), "attention.key_length is 32, expected"),
    "keys and values of old": ("deepseek2", without("blk.0.attn_k_b.weight"), "no tensor blk.0.attn_k_b.weight"),
    "groups that do not fit": ("deepseek2", key(expert_group_count=3), "expert groups do not fit"),
    "groups that leave too few": (
        "deepseek2",
        key(expert_group_count=4, expert_group_used_count=1),
        "1 groups of 2 experts have no 3",
    ),
    "norms of heads": ("gpt-oss", extra("blk.0.attn_q_norm.weight", 32), "tensor blk.0.attn_q_norm.weight"),
}
ONE |= OF_OTHERS


@pytest.mark.parametrize("case", ONE)
def test_refused_in_one_architecture(check: Callable[[str, Edit], Model], case: str) -> None:
    architecture, edit, expected = ONE[case]
    with pytest.raises(FormatError, match=expected):
        check(architecture, edit)


ACCEPTED = {
    "nothing changed": key(),
    "what changes nothing": key(
        vocab_size=999, expert_weights_scale=2.5, expert_gating_func=1, expert_weights_norm=True, pooling_type=1,
        attention__sliding_window=0, rope__scaling__finetuned=True, rope__scaling__yarn_beta_fast=32.0,
        expert_group_count=1, final_logit_softcapping=0.0, attention__causal=True,
    ),
    "keys of another namespace": lambda keys, tensors: keys.update({"llama.attention.sliding_window": 9}),
    "a norm with more dimensions": changed("blk.0.attn_norm.weight", lambda a: a.reshape(1, 1, 64)),
    "tied": without("output.weight"),
    "experts' width by the older key": key(expert_feed_forward_length=None, feed_forward_length=96),
}  # fmt: skip


@pytest.mark.parametrize("architecture", SHAPES)
@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(check: Callable[[str, Edit], Model], architecture: str, case: str) -> None:
    found = check(architecture, ACCEPTED[case])
    assert found.architecture is ARCHITECTURES[architecture] and found.shape.hidden == 32


READ_OVER = {
    "qwen3next": key(expert_weights_norm=False, expert_weights_scale=2.0, rope__scaling__yarn_beta_fast=8.0),
    "minimax-m2": key(expert_weights_norm=False, expert_weights_scale=2.0, expert_feed_forward_length=999),
    "glm4moe": key(expert_gating_func=None, expert_group_count=1, expert_group_used_count=1),
    "deepseek2": key(rope__scaling__yarn_beta_fast=8.0, rope__scaling__yarn_beta_slow=2.0, vocab_size=260),
    "gpt-oss": key(expert_weights_scale=2.0, rope__scaling__yarn_attn_factor=2.0, rope__scaling__yarn_ext_factor=0.5),
}


@pytest.mark.parametrize("architecture", OTHERS)
def test_keys_that_llama_cpp_reads_over(check: Callable[[str, Edit], Model], architecture: str) -> None:
    assert check(architecture, READ_OVER[architecture]).shape == check(architecture, key()).shape


def test_sizes_that_follow_from_tensors_and_lists(check: Callable[[str, Edit], Model]) -> None:
    assert check("qwen35moe", key(expert_shared_feed_forward_length=None)).shape.shared_hidden == 32
    assert check("qwen35moe", key(attention__head_count_kv=[0, 0, 0, 2])).shape.kv_heads == 2
    assert check("qwen35moe", key(rope__dimension_sections=[3, 3, 2, 0])).shape.rotated == 16
    plain = check("qwen3moe", key(rope__freq_base=None)).shape.rope
    assert plain.frequencies[1] == pytest.approx(10000 ** (-2 / 32))


def test_a_draft_block_is_left_out(check: Callable[[str, Edit], Model]) -> None:
    """Its tensors are nobody's, whatever they are called; without them the block is left out just as well."""

    def edit(keys: Keys, tensors: Tensors) -> None:
        keys["qwen35moe.block_count"], keys["qwen35moe.nextn_predict_layers"] = 5, 1
        for name in ("attn_norm", "nextn.eh_proj", "nextn.something_new", "ffn_up_exps", "ffn_gate_exps"):
            shape = (8, 32, 64) if name.endswith("exps") else (64,)
            tensors[f"blk.4.{name}.weight"] = np.ones(shape, np.float32), F32
        tensors["blk.4.ffn_down_exps.weight"] = np.ones((8, 64, 32), np.float32), F32

    found = check("qwen35moe", edit)
    assert found.shape.layers == 4 and sorted(found.experts) == [0, 1, 2, 3]
    assert not any(name.startswith("blk.4") for name in found.resident)
    assert check("qwen35moe", key(block_count=5, nextn_predict_layers=1)).shape.layers == 4


def test_yarn_is_that_of_the_paper() -> None:
    for base, rotated, factor, context in [(1e6, 128, 4.0, 32768), (1e7, 64, 2.0, 262144), (1e4, 32, 8.0, 512)]:
        frequencies, magnitude = yarn(base, rotated, factor, context)
        found = yarn_rope(base, rotated, 1 / factor, context)
        np.testing.assert_allclose(found.frequencies, frequencies, rtol=1e-12)
        assert found.magnitude == pytest.approx(magnitude, rel=1e-12)
        assert found.frequencies[0] == 1.0  # the fastest pair keeps its frequency, the slowest is interpolated
        assert found.frequencies[-1] == pytest.approx(base ** (2 / rotated - 1) / factor, rel=1e-12)


def test_shapes_are_compared_as_shapes() -> None:
    assert same_shape((64,), (64, 1)) and same_shape((64, 1, 1), (64,)) and same_shape((1,), (1, 1))
    assert not same_shape((1, 64), (64,)) and not same_shape((8, 8), (64,)) and not same_shape((4, 8), (8, 4))


# ---- the tools ----


def test_the_tools_refuse_what_would_not_run(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is written; inspect describes it and says so."""
    cases = {
        "a key": (key(attention__sliding_window=128), "attention.sliding_window"),
        "a tensor": (extra("output.bias", 260), "output.bias"),
        "a shape": (changed("output_norm.weight", lambda a: a.reshape(8, 8)), "output_norm.weight"),
        "a tokenizer": (lambda keys, tensors: keys.update({"tokenizer.ggml.model": "t5"}), "'t5'"),
        "an architecture": (lambda keys, tensors: keys.update({"general.architecture": "olmoe"}), "'olmoe'"),
    }
    for edit, expected in cases.values():
        path = edited(models["qwen3moe"], tmp_path / "m.gguf", edit)
        for command in (["plan"], ["pack", "--to", str(tmp_path / "s")], ["index", "--to", str(tmp_path / "s")]):
            assert main([command[0], str(path), *command[1:]]) == 1
            error = capsys.readouterr().err
            assert expected in error and "Traceback" not in error
            assert not (tmp_path / "s").exists()
        assert main(["inspect", str(path)]) == 0
        shown = capsys.readouterr().out
        assert "does not run: " in shown and expected in shown
    assert main(["inspect", str(models["qwen3moe"])]) == 0
    assert "does not run" not in capsys.readouterr().out
