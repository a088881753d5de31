"""Refusals of `load`, `save` and `read_config`, before they take memory."""

import json
import sys
from typing import Any

import checkpoint_definitions as checkpoints
import jax
import numpy as np
import pytest
from flax import nnx
from helpers import untyped
from safetensors.numpy import save_file

from jaxkern import models
from jaxkern.models import _load
from jaxkern.nn import MLP, LowRankSwiGLU, TransformerLM

LLAMA = checkpoints.CASES["Llama 3.1"]
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path):
    return checkpoints.write(tmp_path / "llama", LLAMA, checkpoints.tensors_of(LLAMA))


@pytest.fixture
def takes_no_memory(monkeypatch):
    """Fail where `load` makes arrays."""
    monkeypatch.setattr(_load, "_read", lambda *_: pytest.fail("memory was taken"))


@pytest.mark.usefixtures("takes_no_memory")
def test_a_missing_folder_says_how_to_download_it(tmp_path):
    command = r"hf download meta-llama/Llama-3.2-1B --local-dir meta-llama/Llama-3.2-1B"
    with pytest.raises(FileNotFoundError, match=command):
        models.load("meta-llama/Llama-3.2-1B")
    with pytest.raises(FileNotFoundError, match="load: config.json must be in .* none"):
        models.load(tmp_path)


@pytest.mark.usefixtures("takes_no_memory")
@pytest.mark.parametrize(
    "change, message",
    [
        (
            {QUERY: None},
            rf"a llama .* must have {QUERY} \(24, 24\), got none; 1 tensors",
        ),
        (
            {"extra.weight": (3,)},
            r"no other tensors, got extra.weight \(3,\); 1 tensors",
        ),
        ({QUERY: (24, 23)}, rf"{QUERY} must have shape \(24, 24\), got \(24, 23\) in "),
        # The bias of another config.json.
        (
            {QUERY.replace("weight", "bias"): (24,)},
            "no other tensors, got model.layers.1.self_attn.q_proj.bias",
        ),
    ],
    ids=["missing", "unknown", "shape", "bias"],
)
def test_tensors(folder, change, message):
    tensors = checkpoints.tensors_of(LLAMA)
    for name, shape in change.items():
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = np.zeros(shape, np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"load: .*{message}"):
        models.load(folder)


@pytest.mark.usefixtures("takes_no_memory")
def test_dtypes(folder):
    tensors = checkpoints.tensors_of(LLAMA)
    save_file(
        tensors | {QUERY: np.zeros((24, 24), np.int8)}, folder / "model.safetensors"
    )
    with pytest.raises(
        ValueError, match=f"F64, F32, .* quantized .*, got I8 of {QUERY}"
    ):
        models.load(folder)
    wide = tensors | {QUERY: tensors[QUERY].astype(np.float64)}
    save_file(wide, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match="param_dtype must be given for tensors of F64"
    ):
        models.load(folder)
    save_file({}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="load: the files must have tensors, got none"):
        models.load(folder)


@pytest.mark.usefixtures("takes_no_memory")
def test_files(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for part in (whole[:-3], whole[:9], b""):
        file.write_bytes(part)
        with pytest.raises(
            ValueError, match="must be a whole safetensors file, got Err"
        ):
            models.load(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="must be model.safetensors or .* none"):
        models.load(folder)
    pickle = folder / "pytorch_model.bin"
    pickle.touch()
    reason = "got .*pytorch_model.bin, a pickle, which can run any code when it is read"
    for path in (folder, pickle):
        with pytest.raises((FileNotFoundError, ValueError), match=reason):
            models.load(path)
    index: dict[str, Any] = {"weight_map": {QUERY: "part.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        FileNotFoundError, match="part.safetensors must exist, as model"
    ):
        models.load(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="index.json must have a weight_map, got none"):
        models.load(folder)


LONG = checkpoints.CASES["Phi-3"].raw["rope_scaling"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "bert"}, "model_type must be one of llama, .*, got 'bert'"),
        (
            {"model_type": "gpt_oss"},
            "got 'gpt_oss', which is refused: .* mixtures of ex",
        ),
        ({"model_type": "jaxkern"}, "got 'jaxkern', .*: load_native reads it"),
        ({"model_type": "gemma3"}, "got 'gemma3', .* the text models are gemma3_text"),
        ({"hidden_size": None}, "config.json must have hidden_size, got none"),
        ({"vocab_size": ...}, "config.json must have vocab_size, got none"),
        ({"hidden_act": "gelu"}, "hidden_act must be one of silu, .*, got 'gelu'"),
        (
            {"quantization_config": {}},
            "quantization_config must be None in config.json",
        ),
        (
            {"rope_scaling": {"type": "dynamic"}},
            "rope_type must be one of default, lin",
        ),
        (
            {"rope_scaling": {"type": "linear"}},
            "rope_scaling must have factor in config",
        ),
        (
            {"rope_scaling": LONG | {"short_factor": None}},
            "rope_scaling must have short_factor in config.json, got none",
        ),
        (
            {"rope_scaling": checkpoints.LLAMA3 | {"mscale": 1.0}},
            "rope_scaling of 'llama3' must have the keys original_max_.*, got 'mscale'",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1 for llama"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
            r"the layers without a window must be none, all or .*, got \[0\] of 2",
        ),
        (
            {"model_type": "gemma2", "layer_types": ["full_attention", "chunked"]},
            "layer_types must be 2 of full_attention and sliding_attention in config",
        ),
        (
            {"model_type": "gemma2", "use_bidirectional_attention": True},
            "use_bidirectional_attention must be False in config.json, got True",
        ),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}},
            "rope_type of sliding_attention must be 'default' in config.json, got 'lin",
        ),
    ],
)
def test_config(folder, change, message):
    raw = {**LLAMA.raw, **change}
    raw = {key: value for key, value in raw.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=f"read_config: .*{message}.*; the file is"):
        models.read_config(folder)


def test_config_files(folder):
    for text, message in [("{", "must be JSON"), ("[]", "must have a dictionary")]:
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=f"read_config: .*config.json {message}"):
            models.read_config(folder)


def model_of(**given) -> Any:
    """Return a tiny model of zeros."""
    options: dict[str, Any] = {"embed_dim": 8, "num_layers": 1, "num_heads": 2}
    options |= {"hidden_dim": 12, "rope_pairs": "halves"} | given
    model = nnx.eval_shape(
        lambda: TransformerLM(16, 8, **options, scan_layers=False, rngs=nnx.Rngs(0))
    )
    graph, state = nnx.split(model)
    zeros = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype)), state)
    return nnx.merge(graph, zeros)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"rope_pairs": "interleaved"},
            "nearest is llama, but .*rope_pairs='interleaved",
        ),
        (
            {"activation": "sigmoid"},
            "nearest is llama, but hidden_act must be .*'sigmoid",
        ),
        ({"qk_norm": "embed"}, "the nearest is llama, but it has no qk_norm='embed'"),
        (
            {"mlp": lambda *a, **o: LowRankSwiGLU(*a, rank=2, **o)},
            "must be those .*mlp.*save_native keeps compressed",
        ),
        (
            {"mlp": lambda *a, **o: MLP(*a, gated=True, activation="gelu", **o)},
            "mlp must be .*; save_native keeps MLPs",
        ),
    ],
)
def test_models_that_no_family_has(tmp_path, options, message):
    model = model_of(**options)
    with pytest.raises(ValueError, match=f"save: .*{message}"):
        models.save(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.usefixtures("unchecked_types")
def test_save(folder, tmp_path):
    model = model_of()
    with pytest.raises(
        TypeError, match="model must be a TransformerLM, got SwiGLU|Laye"
    ):
        untyped.models.save(model.layers[0].mlp, tmp_path / "saved")
    with pytest.raises(FileExistsError, match="no model, got .*llama with config.json"):
        models.save(model, folder)
    with pytest.raises(
        FileExistsError, match="must be a folder, got the file .*config"
    ):
        models.save(model, folder / "config.json")
    with pytest.raises(ValueError, match="like must say .*without vocab_size=16, emb"):
        models.save(model, tmp_path / "saved", like=folder)


@pytest.mark.usefixtures("takes_no_memory")
def test_an_mlp_with_other_parameters(folder):
    def mlp(*sizes, **options):
        return LowRankSwiGLU(*sizes, rank=2, **options)

    with pytest.raises(
        ValueError, match="mlp must have the parameters of a llama, got "
    ):
        models.load(folder, mlp=mlp)


@pytest.mark.usefixtures("takes_no_memory")
def test_without_the_package(folder, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("safetensors")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'pip install "jaxkern-fused\[models\]"'):
        models.load(folder)
    assert models.read_config(folder).embed_dim == 24
