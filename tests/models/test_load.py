"""Checkpoints into language models and back: values, bits, memory and meshes."""

import json
from dataclasses import replace
from typing import Any

import checkpoint_definitions as checkpoints
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import transformer_definitions as definitions
from flax import nnx
from helpers import assert_near
from jax import P
from safetensors.numpy import load_file

from jaxkern import models
from jaxkern.models import _load, _save
from jaxkern.models._config import resolve
from jaxkern.nn import SwiGLU, TransformerConfig, get_sharding, make_mesh

LLAMA = checkpoints.CASES["Llama 3.1"]


def assert_equal(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        np.testing.assert_array_equal(got[name], tensor, name)


@pytest.mark.parametrize("name", checkpoints.CASES)
def test_logits_and_tensors_of_each_family(tmp_path, name):
    """The logits are NumPy's, and `save` writes the tensors that were read."""
    case = checkpoints.CASES[name]
    tensors = checkpoints.tensors_of(case)
    folder = checkpoints.write(tmp_path / "given", case, tensors)
    scan_layers = name not in ("Mistral", "OLMo 2", "Phi-3")
    model = models.load(folder, scan_layers=scan_layers)
    assert resolve(model.config) == resolve(TransformerConfig(**case.options))
    tokens = np.random.default_rng(1).integers(0, 50, (2, 24))
    options = {x: y for x, y in case.options.items() if y is not None}
    exact = definitions.frame_logits(
        checkpoints.state_of(case, tensors), tokens, options
    )
    logits = jax.jit(lambda tokens: model(tokens))(jnp.asarray(tokens))
    assert_near(logits, exact, 1e-5)
    models.save(model, tmp_path / "like", like=folder)
    assert_equal(load_file(tmp_path / "like" / "model.safetensors"), tensors)
    raw = json.loads((tmp_path / "like" / "config.json").read_text())
    assert raw == case.raw | {"torch_dtype": "float32"}
    models.save(model, tmp_path / "new")
    again = models.read_config(tmp_path / "new")
    assert resolve(again) == resolve(model.config)


def test_dtypes(tmp_path):
    tensors = checkpoints.tensors_of(LLAMA, ml_dtypes.bfloat16)
    folder = checkpoints.write(tmp_path / "given", LLAMA, tensors)
    model = models.load(folder, scan_layers=False)
    assert model.dtype == model.embedding[...].dtype == jnp.bfloat16
    models.save(model, tmp_path / "saved")
    assert_equal(load_file(tmp_path / "saved" / "model.safetensors"), tensors)
    wide = models.load(
        folder, dtype=jnp.bfloat16, param_dtype=jnp.float32, scan_layers=False
    )
    assert wide.dtype == jnp.bfloat16
    up = wide.layers[1].mlp.w_up[...]
    exact = tensors["model.layers.1.mlp.up_proj.weight"].T.astype(np.float32)
    np.testing.assert_array_equal(np.asarray(up), exact)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    mixed = models.load(checkpoints.write(folder, LLAMA, tensors), scan_layers=False)
    assert mixed.dtype == mixed.embedding[...].dtype == jnp.float32


def test_several_files_and_tensors_that_follow(tmp_path, monkeypatch):
    case = checkpoints.CASES["Llama with biases"]
    tensors = checkpoints.tensors_of(case)
    folder = checkpoints.write(tmp_path / "given", case, tensors)
    model = models.load(folder)
    monkeypatch.setattr(_save, "FILE_BYTES", 10_000)
    models.save(model, tmp_path / "saved")
    index = json.loads((tmp_path / "saved/model.safetensors.index.json").read_text())
    files = sorted({*index["weight_map"].values()})
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 2
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"]["total_size"] == total
    found = {}
    for name in files:
        found |= load_file(tmp_path / "saved" / name)
    assert_equal(found, tensors)
    again = models.load(tmp_path / "saved")
    same = jax.tree.map(np.array_equal, nnx.state(again), nnx.state(model))
    assert all(jax.tree.leaves(same))
    # The head is tied, and the frequencies follow from config.json.
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    models.load(checkpoints.write(folder, case, tensors) / "model.safetensors")


def test_on_a_mesh(tmp_path, monkeypatch):
    """The parameters of each layer are put to their devices in parts."""
    put, places = _load._place, {}

    def place(value, place):
        places[value.shape] = place.spec
        return put(value, place)

    monkeypatch.setattr(_load, "_place", place)
    case = checkpoints.CASES["Phi-3"]
    tensors = checkpoints.tensors_of(case)
    folder = checkpoints.write(tmp_path / "given", case, tensors)
    mesh = make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    model = models.load(folder, mesh=mesh)
    state = nnx.state(model)
    placed = jax.tree.map(lambda x: x.sharding, state)
    assert placed == get_sharding(state, mesh)
    assert model.layers.mlp.w_up[...].sharding.spec == P(None, "fsdp", "tensor")
    assert places[32, 40] == P("fsdp", "tensor")
    assert places[4, 8, 32] == P("tensor", None, "fsdp")
    assert model.mesh == mesh
    models.save(model, tmp_path / "saved", like=folder)
    assert_equal(load_file(tmp_path / "saved" / "model.safetensors"), tensors)


@pytest.mark.parametrize(
    "name, change, options",
    [
        ("Mistral", {"sliding_window": None}, {"window": None}),
        ("Mistral", {"sliding_window": ...}, {"window": 4096}),
        ("Qwen 3", {"use_sliding_window": ...}, {"window": None}),
        ("Qwen 3", {"max_window_layers": ...}, {"window": None}),
        ("Qwen 3", {"layer_types": ["full_attention"] * 2}, {"window": None}),
        ("Gemma 2", {"hidden_activation": "gelu_new"}, {}),
        ("Gemma 2", {"tie_word_embeddings": ...}, {"tie_embeddings": True}),
        ("Gemma 2", {"query_pre_attn_scalar": ...}, {"attention_scale": 1 / 16}),
        ("Gemma 3", {"layer_types": None, "sliding_window_pattern": 2}, {}),
        # All layers have windows: the third would be the first without.
        (
            "Gemma 3",
            {"layer_types": None, "sliding_window_pattern": 4},
            {"full_attention_every": None, "local_rope_theta": None}
            | {"rope_theta": 20.0, "rope_scaling": None},
        ),
        (
            "Gemma 3",
            {
                "rope_parameters": ...,
                "rope_local_base_freq": 20,
                "rope_theta": 100.0,
                "rope_scaling": {"type": "linear", "factor": 8},
            },
            {},
        ),
        (
            "Gemma 3",
            {"rope_parameters": ...},
            {"rope_theta": 1e6, "rope_scaling": None} | {"local_rope_theta": 1e4},
        ),
        (
            "Llama 3.1",
            {"rope_theta": ..., "rope_scaling": None},
            {"rope_theta": 1e4, "rope_scaling": None},
        ),
        ("Llama 3.1", {"num_key_value_heads": ...}, {"num_kv_heads": 4}),
        ("Llama 3.1", {"original_max_position_embeddings": 16}, {}),
        (
            "Phi-3",
            {
                "rope_scaling": checkpoints.CASES["Phi-3"].raw["rope_scaling"]
                | {"type": "su"}
            },
            {},
        ),
        ("OLMo 2", {"rms_norm_eps": ...}, {"norm_epsilon": 1e-5}),
    ],
)
def test_forms_of_config(tmp_path, name, change, options):
    """Keys may be missing, and have other names in older files."""
    raw, expected = checkpoints.CASES[name]
    raw = {key: x for key, x in (raw | change).items() if x is not ...}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    got = models.read_config(tmp_path)
    assert resolve(got) == resolve(TransformerConfig(**expected | options))


def test_longrope_takes_the_list_of_its_length(tmp_path):
    case = checkpoints.CASES["Phi-3"]
    folder = checkpoints.write(tmp_path, case, {})
    short = models.read_config(folder, context_length=16)
    scaling: Any = case.options["rope_scaling"]
    assert short.context_length == 16
    assert short.rope_scaling == replace(scaling, factors=(1.0, 1.5, 2.0))
    assert models.read_config(folder, context_length=17).rope_scaling == scaling


def test_another_mlp_with_the_parameters(tmp_path):
    tensors = checkpoints.tensors_of(LLAMA)
    folder = checkpoints.write(tmp_path, LLAMA, tensors)

    class Other(SwiGLU):
        pass

    model = models.load(folder, mlp=Other, scan_layers=False)
    assert type(model.layers[0].mlp) is Other
