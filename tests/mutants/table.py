"""Faults that someone could write, each with the tests that must find it.

The text that a mutant replaces occurs once in its file. If the code has changed, the
mutant is stale, and `run.py` says so: update its text. Tests are as few as possible.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One fault.

    name: what `--only` takes.
    fault: what goes wrong, in a sentence.
    path: the file, from the root of the repository.
    text, replacement: a part of the file, and the mutant's code in its place.
    tests: the test file, from the root, and an expression for `pytest -k`.
    """

    name: str
    fault: str
    path: str
    text: str
    replacement: str
    tests: tuple[str, str]


SAVE = """        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data)
        )
        self.manager.save(step, args=args)
"""
LOG = "        self.log.append(records)\n"
BY_TILES = (
    "tests/attention/test_dense.py",
    "test_values_and_gradients and tiles and 17x65-causal",
)
MASK_OF_A_FUNCTION = (
    "tests/attention/hopper/test_attend.py",
    "test_masks and functions",
)
RELU2_KERNEL = ("tests/mlp/hopper/test_fused.py", "test_relu2 and 7x90")
GATED_KERNEL = ("tests/mlp/hopper/test_fused.py", "test_gated and 7x90")
MASKED_TILES = ("tests/masked/hopper/test_multiply.py", "test_tiles and 64")
UNSUPPORTED = ("tests/mlp/test_flash_mlp.py", "test_unsupported")

MUTANTS = (
    # Factors of gradients.
    Mutant(
        "attention-delta",
        "The gradient of the logits lacks what the softmax subtracts of each row.",
        "jaxkern/_attention/tiles.py",
        "weights * (d_weights - delta[..., None]) * scale",
        "weights * d_weights * scale",
        BY_TILES,
    ),
    Mutant(
        "lse-gradient",
        "The gradient of the log-sum-exp is dropped.",
        "jaxkern/_attention/tiles.py",
        "return d_out, delta - jnp.where(seen, d_lse, 0)",
        "return d_out, delta",
        BY_TILES,
    ),
    Mutant(
        "stop-gradient-mix",
        "The shares of dilated patterns have a gradient where none is asked for.",
        "jaxkern/_attention/dilated.py",
        "shares = jax.lax.stop_gradient(shares)",
        "pass",
        ("tests/attention/test_dilated.py", "test_stop_gradient_mix"),
    ),
    Mutant(
        "estimator-gradient",
        "The slope of the straight-through estimator is differentiated too.",
        "jaxkern/_masked/bernoulli.py",
        "soft = lax.stop_gradient(_sigmoid_slope(wide)) * wide",
        "soft = _sigmoid_slope(wide) * wide",
        ("tests/masked/test_estimators.py", "test_closed_forms_of_binary_draws"),
    ),
    Mutant(
        "masked-slope",
        "A term of the slope in the mask kernel has the wrong sign.",
        "jaxkern/_masked/hopper/gradients.py",
        "lambda p: 1 + p - p * p",
        "lambda p: 1 + p + p * p",
        (
            "tests/masked/hopper/test_multiply.py",
            "test_slopes_in_the_kernel and one_plus_sigmoid",
        ),
    ),
    Mutant(
        "silu-gate",
        "The kernel takes the derivative of silu at `up` instead of the gate.",
        "jaxkern/_mlp/hopper/fused.py",
        "sums[0] * up * derivative(gate)",
        "sums[0] * up * derivative(up)",
        GATED_KERNEL,
    ),
    # Edges of masks, heads and tiles.
    Mutant(
        "causal-diagonal",
        "A causal query does not see its own token.",
        "jaxkern/_attention/tiling.py",
        "column <= row[:, None] + self.diagonal",
        "column < row[:, None] + self.diagonal",
        BY_TILES,
    ),
    Mutant(
        "window-edge",
        "A local window is one token too short on its left.",
        "jaxkern/_attention/block_mask/predicates.py",
        "k - q >= self.lower",
        "k - q > self.lower",
        ("tests/attention/block_mask/test_named.py", "test_local_window"),
    ),
    Mutant(
        "full-block",
        "A partial block after the last full one of a band counts as full.",
        "jaxkern/_attention/block_mask/patterns.py",
        "full = row, blocks_of(start, block_size), stop // block_size",
        "full = row, blocks_of(start, block_size), stop // block_size + 1",
        ("tests/attention/block_mask/test_named.py", "test_states_at_every_edge"),
    ),
    Mutant(
        "ragged-keys",
        "A kernel's last partial block sees the zeros after the last key.",
        "jaxkern/_attention/hopper/predicates.py",
        "where.positions(1 - self.q_axis) < self.seq_kv",
        "where.positions(1 - self.q_axis) <= self.seq_kv",
        MASK_OF_A_FUNCTION,
    ),
    Mutant(
        "shared-heads",
        "Query heads walk the keys of another group's head.",
        "jaxkern/_attention/hopper/walk.py",
        "lax.div(head * walk.heads + g, walk.share)",
        "lax.rem(head * walk.heads + g, walk.share)",
        ("tests/attention/hopper/test_attend.py", "test_sizes and 24"),
    ),
    Mutant(
        "tile-in-block",
        "The kernel walks the first tile of a block of several tiles again.",
        "jaxkern/_attention/hopper/walk.py",
        "lax.rem(n, each) * columns",
        "lax.div(n, each) * columns",
        ("tests/attention/hopper/test_attend.py", "test_sizes and 290"),
    ),
    Mutant(
        "last-columns",
        "The first column that only fills up the last chunk counts as a token.",
        "jaxkern/_cross_entropy.py",
        "jnp.where(ids < vocab, logits, _below(logits))",
        "jnp.where(ids <= vocab, logits, _below(logits))",
        ("tests/test_cross_entropy.py", "test_values_and_gradients and ragged"),
    ),
    Mutant(
        "soft-cap-slope",
        "Logits are capped softly, and their gradient is not.",
        "jaxkern/_cross_entropy.py",
        "(1 + bent) * (1 - bent)",
        "1.0",
        ("tests/test_cross_entropy.py", "test_values_and_gradients and ragged"),
    ),
    # Rings.
    Mutant(
        "zigzag-order",
        "The second half of a zigzag is in ascending order.",
        "jaxkern/_attention/context_parallel.py",
        "parts[: devices - 1 : -1]",
        "parts[devices:]",
        ("tests/attention/test_ring.py", "test_permutation"),
    ),
    Mutant(
        "ring-gradients",
        "The gradients of keys and values end one device too far.",
        "jaxkern/_attention/ring_steps.py",
        "d_held = ring.send_on(d_held)",
        "d_held = ring.send_on(ring.send_on(d_held))",
        ("tests/attention/test_ring.py", "test_causal_equals_dense and zigzag and 8"),
    ),
    # Races of kernels.
    Mutant(
        "missing-commit",
        "A result is copied from shared memory before it is visible to TMA.",
        "jaxkern/_mosaic/matmul.py",
        "plgpu.commit_smem()",
        "pass",
        RELU2_KERNEL,
    ),
    Mutant(
        "early-release",
        "A slot of values is given back before the matmul that reads it.",
        "jaxkern/_attention/hopper/kernels.py",
        "summed = add_dots(summed, (rounded, values))\n        tiles.release(1)",
        "tiles.release(1)\n        summed = add_dots(summed, (rounded, values))",
        ("tests/attention/hopper/test_attend.py", "test_sizes and 24"),
    ),
    Mutant(
        "one-arrival",
        "A slot is filled again when the first of two warpgroups is done with it.",
        "jaxkern/_mosaic/launch.py",
        "for arrivals in (self.copies, COMPUTE)",
        "for arrivals in (self.copies, 1)",
        # The emulator meets this race in most orders of its threads, not in all.
        ("tests/mlp/hopper/test_fused.py", "test_relu2"),
    ),
    Mutant(
        "missing-wait",
        "A slot is given back while the wgmma that reads it may still run.",
        "jaxkern/_masked/hopper/product.py",
        "plgpu.wgmma_wait(0)",
        "plgpu.wgmma_wait(1)",
        MASKED_TILES,
    ),
    Mutant(
        "store-overwritten",
        "A result is overwritten in shared memory while TMA may still read it.",
        "jaxkern/_masked/hopper/product.py",
        "plgpu.wait_smem_to_gmem(0, wait_read_only=True)",
        "pass",
        MASKED_TILES,
    ),
    # Selecting, drawing and packing.
    Mutant(
        "order-of-equals",
        "2:4 keeps the last of equal entries instead of the first.",
        "jaxkern/_sparsity/select.py",
        "(other == scores) & (i < position)",
        "(other == scores) & (i > position)",
        ("tests/sparsity/test_select.py", "test_top2_on_every_order"),
    ),
    Mutant(
        "position-bits",
        "The positions in a byte have the highest bits first.",
        "jaxkern/_sparsity/packed.py",
        "POSITION_BITS * last_index(quads.shape)",
        "POSITION_BITS * (POSITIONS_PER_BYTE - 1 - last_index(quads.shape))",
        ("tests/sparsity/test_select.py", "test_packed_layout"),
    ),
    Mutant(
        "word-order",
        "Masks are packed and unpacked with the highest bit first.",
        "jaxkern/_masked/packed.py",
        "jnp.arange(WORD, dtype=jnp.uint32)",
        "jnp.arange(WORD, dtype=jnp.uint32)[::-1]",
        ("tests/masked/test_packed.py", "test_layout"),
    ),
    Mutant(
        "one-key-for-all",
        "All samples of a batch draw their masks with one key.",
        "jaxkern/_masked/forms.py",
        "jax.random.split(self.key, (self.samples, len(self.logits)))",
        "jax.random.split(self.key, (1, len(self.logits))).repeat(self.samples, 0)",
        ("tests/masked/test_masked.py", "test_draws_are_the_same and fused and matmul"),
    ),
    # Implementations that run, and arguments that are refused.
    Mutant(
        "falls-back",
        "XLA runs instead of a named kernel that cannot, without an error.",
        "jaxkern/_core/dispatch.py",
        'raise NotImplementedError(f"{op}: {reason}")',
        'return "xla"',
        UNSUPPORTED,
    ),
    Mutant(
        "one-platform",
        "A program traced beside a GPU holds the kernel alone, and fails on the CPU.",
        "jaxkern/_core/dispatch.py",
        "if implementation is None and any(isinstance(x, Tracer) for x in leaves):",
        "if implementation is None and False:",
        ("tests/test_platforms.py", "swiglu or own_form"),
    ),
    Mutant(
        "any-device",
        "Every device counts as a Hopper GPU.",
        "jaxkern/_core/device.py",
        'return device.platform == "gpu" and capability.startswith("9.")',
        "return True",
        UNSUPPORTED,
    ),
    Mutant(
        "bool-is-integer",
        "True is taken for the integer 1.",
        "jaxkern/_core/checks.py",
        "isinstance(value, Integral) and not isinstance(value, bool)",
        "isinstance(value, Integral)",
        ("tests/nn/test_mlp.py", "test_refusals"),
    ),
    Mutant(
        "narrow-integers",
        "Targets are compared with the vocabulary in their own few bits.",
        "jaxkern/_cross_entropy.py",
        "return as_int32(targets), where",
        "return jnp.asarray(targets), where",
        ("tests/test_cross_entropy.py", "integer"),
    ),
    # Numbers at their limits.
    Mutant(
        "unseen-rows",
        "A cotangent of a row that sees nothing is multiplied by its weights of 0.",
        "jaxkern/_attention/tiles.py",
        "d_out = jnp.where(seen[..., None], d_out, 0)",
        "d_out = jnp.where(True, d_out, 0)",
        ("tests/attention/test_numerics.py", "rows_that_see_nothing and nan"),
    ),
    Mutant(
        "float16-range",
        "Gradients of logits are rounded to float16 before they are multiplied.",
        "jaxkern/_core/precision.py",
        "return widen(x) if x.dtype == jnp.float16 else x",
        "return x",
        ("tests/attention/test_numerics.py", "test_error_in_16_bits and float16"),
    ),
    Mutant(
        "far-tails",
        "The noise of a draw reaches only as far as one uniform number lets it.",
        "jaxkern/_sparsity/select.py",
        'weight.dtype, mode="high")',
        'weight.dtype, mode="low")',
        ("tests/sparsity/test_select.py", "test_noise_reaches_far_tails"),
    ),
    # Models and benchmarks.
    Mutant(
        "rotary-fraction",
        "Rotary angles lose the fraction of their frequency.",
        "jaxkern/_attention/rotary.py",
        "size * whole + high * rest_high",
        "size * whole",
        ("tests/attention/test_rotary.py", "test_exact_at_any_position and uint32"),
    ),
    Mutant(
        "prompt-lengths",
        "New tokens follow the longest prompt also in rows whose prompt is shorter.",
        "jaxkern/nn/_generate.py",
        "features, memory = model.extend(prompt, memory, lengths)",
        "features, memory = model.extend(prompt, memory)",
        (
            "tests/nn/test_generate.py",
            "test_prompts_of_unequal_length_are_as_alone and not dilated",
        ),
    ),
    Mutant(
        "window-ring",
        "Several new tokens overwrite cached keys that the first of them still see.",
        "jaxkern/nn/_cache.py",
        "if key.shape[1] == 1 or places != window:",
        "if True:",
        ("tests/nn/test_generate.py", "test_features_with_a_cache"),
    ),
    Mutant(
        "packed-targets",
        "The last token of a document should predict the first of the next one.",
        "jaxkern/nn/_transformer_loss.py",
        "where = inside if where is None else where & inside",
        "pass",
        ("tests/nn/test_families.py", "test_packed_documents and gpt"),
    ),
    Mutant(
        "top-p",
        "A token stays although likelier ones have a probability of top_p.",
        "jaxkern/nn/_generate.py",
        "before < top_p, after > 1 - top_p",
        "before <= top_p, after >= 1 - top_p",
        ("tests/nn/test_sampling.py", "test_top_p"),
    ),
    Mutant(
        "sharded-rows",
        "The last weight of SwiGLU is split along its other axis.",
        "jaxkern/nn/_dense_mlp.py",
        'rngs, narrow, param_dtype, ("mlp", "embed")',
        'rngs, narrow, param_dtype, ("embed", "mlp")',
        ("tests/nn/test_mlp.py", "test_every_kernel_has_a_partition_spec"),
    ),
    Mutant(
        "checkpoint-first",
        "A checkpoint is written before the log up to it.",
        "examples/_checkpoints.py",
        LOG + SAVE,
        SAVE + LOG,
        ("tests/examples/test_train_lm.py", "beside_the_write_of_a_checkpoint"),
    ),
    Mutant(
        "times-first",
        "A benchmark times a program before it checks the values.",
        "benchmarks/_harness.py",
        "    check = program.check(checked)\n",
        "    clock(lambda: checked(*program.args), program.block, 2, options.timing)\n"
        "    check = program.check(checked)\n",
        ("tests/benchmarks/test_harness.py", "test_a_wrong_kernel_is_refused"),
    ),
)
