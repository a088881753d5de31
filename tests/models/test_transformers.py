"""Each family against the models of `transformers`, where that and PyTorch are there.

`pytest -s tests/models/test_transformers.py` prints the table of the guide. Nothing is
downloaded: the models are tiny and random.
"""

from typing import Any

import checkpoint_definitions as checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import relative_error
from safetensors.numpy import load_file

from jaxkern import models
from jaxkern.models._config import resolve
from jaxkern.models._families import DEFAULTS, FAMILIES

torch: Any = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers: Any = pytest.importorskip(
    "transformers", reason="transformers is not installed"
)
pytestmark = pytest.mark.filterwarnings("ignore")

# Families whose options the cases of other families have, too.
CASES = checkpoints.CASES | {
    "Llama 2": checkpoints.case("llama", {}, {}),
    "Llama 3.2": checkpoints.case(
        "llama",
        {"rope_scaling": checkpoints.LLAMA3, "tie_word_embeddings": True},
        {"tie_embeddings": True},
    ),
    "Qwen 2": checkpoints.case("qwen2", {}, {"qkv_bias": True}),
}
ROW = "| {:<17} | {:>5} | {:>12.0e} | {:>12.0e} | {:>5} | {:>5} |"
# transformers computes norms, rotary positions and softmax in float32 at any dtype.
# Here they are in float64, so that a wrong epsilon is not lost in rounding.
BOUND = 1e-12


@pytest.fixture
def in_float64(monkeypatch):
    """Compute in float64 in JAX, and also where PyTorch's models name float32."""
    for name in ("float", "float32"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with jax.enable_x64(True):
        yield


def reference_of(folder) -> Any:
    """Return the model of transformers, and check that it has all tensors."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float64,
        attn_implementation="eager",
        output_loading_info=True,
    )
    lost = info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"]
    assert not any(lost)
    return model.eval()


def logits_and_gradients(model, tokens) -> Any:
    """Return the logits of a model of transformers, and the gradients by name."""
    ids = torch.tensor(tokens)
    logits = model(ids[:, :-1]).logits
    torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)
    ).backward()
    gradients = {name: x.grad.numpy() for name, x in model.named_parameters()}
    return logits.detach().numpy(), gradients


@pytest.mark.usefixtures("in_float64", "promoting")
@pytest.mark.parametrize("name", CASES)
def test_family(tmp_path, name):
    case = CASES[name]
    tensors = checkpoints.tensors_of(case, np.float64)
    folder = checkpoints.write(tmp_path / "given", case, tensors)
    reference, model = reference_of(folder), models.load(folder)
    tokens = np.random.default_rng(1).integers(0, 50, (2, 25))
    exact, by_name = logits_and_gradients(reference, tokens)

    # The gradients in the form of a checkpoint are those of the model.
    gradients = checkpoints.write(tmp_path / "gradients", case, by_name)
    expected = nnx.state(models.load(gradients))

    @jax.jit
    def run(state, tokens):
        def loss(state):
            model = nnx.merge(graph, state)
            value = model.loss(tokens[:, :-1], tokens[:, 1:])
            return value, model(tokens[:, :-1])

        return jax.grad(loss, has_aux=True)(state)

    graph, state = nnx.split(model)
    got, logits = run(state, jnp.asarray(tokens))
    value = relative_error(logits, exact)
    slope = max(
        relative_error(a, b)
        for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True)
    )

    # A prompt above the 16 tokens at which Phi-3 takes its other list.
    prompt, new = tokens[:, :18], 10
    written = reference.generate(
        torch.tensor(prompt), max_new_tokens=new, do_sample=False
    )
    ours: Any = [
        model.generate(jnp.asarray(prompt), max_new_tokens=new, cache=cache)
        for cache in (True, False)
    ]
    generates = np.array_equal(ours[0], ours[1])
    assert np.array_equal(ours[0], written.numpy())

    saves = []
    for like in (folder, None):
        saved = tmp_path / f"saved {like is None}"
        models.save(model, saved, like=like)
        again = reference_of(saved)
        if like is not None:
            kept, given = again.state_dict(), reference.state_dict()
            assert kept.keys() == given.keys()
            saves += [torch.equal(kept[name], given[name]) for name in given]
        with torch.no_grad():
            both = [x(torch.tensor(tokens)).logits for x in (again, reference)]
        saves.append(torch.equal(*both))
    row = ROW.format(
        name,
        "yes",
        value,
        slope,
        *("yes" if x else "no" for x in (generates, all(saves))),
    )
    print(row)
    assert value < BOUND and slope < BOUND and generates and all(saves)


@pytest.mark.usefixtures("in_float64", "promoting")
def test_a_short_context_of_longrope(tmp_path):
    case = checkpoints.CASES["Phi-3"]
    tensors = checkpoints.tensors_of(case, np.float64)
    folder = checkpoints.write(tmp_path, case, tensors)
    model = models.load(folder, context_length=16)
    tokens = np.random.default_rng(1).integers(0, 50, (2, 16))
    with torch.no_grad():
        exact = reference_of(folder)(torch.tensor(tokens)).logits.numpy()
    logits = jax.jit(lambda tokens: model(tokens))(jnp.asarray(tokens))
    assert relative_error(logits, exact) < BOUND


@pytest.mark.usefixtures("in_float64", "promoting")
def test_what_transformers_saves(tmp_path):
    """Its own form of config.json, with `rope_parameters`, is read as ours is."""
    for name in ("Llama 3.1", "Gemma 3", "Phi-3"):
        case = checkpoints.CASES[name]
        tensors = checkpoints.tensors_of(case, np.float64)
        given, saved = tmp_path / f"{name} given", tmp_path / f"{name} saved"
        reference_of(checkpoints.write(given, case, tensors)).save_pretrained(saved)
        configs = [resolve(models.read_config(x)) for x in (saved, given)]
        assert configs[0] == configs[1]
        model = models.load(saved)
        models.save(model, tmp_path / name, like=saved)
        kept = load_file(tmp_path / name / "model.safetensors")
        assert kept.keys() == tensors.keys()
        assert all(np.array_equal(kept[key], tensors[key]) for key in kept)


def test_defaults():
    """A key that config.json lacks has the value that transformers takes for it."""
    for family in FAMILIES:
        config = transformers.AutoConfig.for_model(family.model_type)
        for key, value in (DEFAULTS | dict(family.defaults)).items():
            found = getattr(config, key, value)
            if key == "sliding_window" and family.windows in ("none", "last"):
                continue
            # transformers fills these in by other keys.
            if value is None and key in ("num_key_value_heads", "head_dim"):
                continue
            assert found == value, (family.model_type, key)
