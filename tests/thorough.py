"""The tests that `make test` leaves to `make test CASES=all`.

People wait for `make test`. Each test here takes seconds, and a test that stays finds
the same kind of fault: in the same kernel at another size, dtype or transform, or with
the same check of another layout. `make mutants` shows that the tests that stay find
planted faults.

The tables have, for each file, its tests with the names of the cases that are left out.
"""

EVERY = ()
ATTENTION = {
    "attention/test_dense.py": {
        # The cases of tiles stay; JAX differentiates the short form by itself.
        "test_transforms": ("short",),
        "test_jacobian_and_second_derivatives": ("short",),
        "test_any_tiles_give_the_same": EVERY,
        "test_long_sequences_go_by_tiles": ("float32", "float16"),
        "test_logits_up_to_1e4": ("f32-tiles", "f32-short"),
        "test_error_in_16_bits_is_that_of_the_plain_form": (
            "tiles-65-mask-causal-float16",
            "tiles-130-causal-bfloat16",
        ),
    },
    "attention/test_dilated.py": {
        "test_any_patterns": EVERY,
        "test_jacobian": ("rate does not divide segment",),
        "test_heads_split_among_patterns": ("8-2-", "6-6-", "5-5-"),
        "test_low_precision_is_within_twice_the_plain_form": ("float16",),
        "test_segments_longer_than_a_tile_of_attention": ("full",),
        "test_head_offsets": ("all divides-pattern", "one key head-blocks"),
        "test_rows_are_not_gathered": ("two heads a key",),
        "test_gradients_by_finite_differences_through_the_mixture": EVERY,
    },
    "attention/test_block_sparse.py": {
        "test_is_dense_attention": ("tokens", "shared", "causal, wide", "heads"),
        "test_any_mask_is_dense_attention": EVERY,
        "test_sharded_arguments": ("heads",),
        "test_one_key_head_other_value_dim_and_scale": ("shared",),
        "test_shard_map_over_batch_and_heads": ("shared-4",),
        "test_jacobian": ("heads",),
    },
    "attention/test_ring.py": {
        "test_context_parallel_attention": ("zigzag-auto", "contiguous-explicit"),
        "test_several_tiles_a_part": ("striped", "contiguous"),
        "test_error_in_16_bits_is_that_of_the_plain_form": ("f16",),
        "test_causal_equals_dense": ("zigzag-2",),
    },
    "attention/test_ring_dilated.py": {
        "test_equals_dilated_attention_of_whole_arrays": ("1-True", "4-False"),
        "test_context_parallel_attention": ("auto",),
        "test_head_offsets": ("pattern",),
        "test_error_in_16_bits_is_that_of_whole_arrays": EVERY,
        "test_in_a_module_under_remat_scan_and_vmap": EVERY,
        "test_memory_is_linear_in_the_sequence_over_the_devices": EVERY,
    },
    "attention/block_mask/test_given.py": {
        "test_from_blocks": ("shared", "heads"),
    },
    "attention/block_mask/test_named.py": {
        "test_document_and_from_blocks_under_jit": ("returning", "batch", "negative"),
    },
    "attention/hopper/test_attend.py": {
        "test_sizes": (
            "1x100x300x2x1x80x40-192-whole-bfloat16-None",
            "1x1x7x3x3x1x1-128-causal-float16--0.5",
        ),
        "test_any_size_lowers_for_a_gpu": ("documents", "dense"),
        "test_known_and_traced_masks_give_the_same_under_vmap": EVERY,
    },
    "attention/hopper/test_dense.py": {
        "test_ring_of_four_lowers_for_a_gpu": ("dilated",),
        "test_steps_of_a_ring": ("half of the keys", "half of the queries"),
        "test_dilated_attention": ("heads of a key are alike",),
        "test_ring_of_one": EVERY,
    },
    "attention/hopper/test_schedule.py": {
        "test_a_known_mask_is_scheduled_on_the_host": ("checkpoint",),
        "test_host_and_program_agree": ("half-3-1-2x64", "of each batch-20-2-1x128"),
    },
}
MLP = {
    "mlp/hopper/test_fused.py": {
        "test_tiles": ("128", "256"),
        "test_sparse": ("150x160x203x70x40-2:4", "7x90x130x3x1-2:4-soft"),
        "test_straight_through": EVERY,
        "test_extreme_values_stay_in_their_token_and_calls_are_equal": ("None", "2:4"),
        "test_in_shard_map_and_scan": ("None",),
        "test_gated": ("264x140x320x64x66",),
        "test_relu2": ("264x140x320x64x66",),
    },
    "mlp/hopper/test_flash.py": {
        "test_values_and_gradients": (
            "2x150x64x264-silu-bfloat16-largest-False",
            "1x130x120x136-gelu-float16-split-False",
        ),
        "test_other_sizes_and_activations": (
            "1x63x96x200-relu2-float16",
            "1x17x16x8-relu-bfloat16",
            "1x129x128x136-identity-bfloat16",
        ),
        "test_gated_by_another_input": ("1x65x16x72-largest",),
        "test_a_block_takes_several_tiles": ("split",),
        "test_under_other_transforms": ("scan",),
    },
    "mlp/test_packed_mlp.py": {
        "test_kernel": (
            "200x140x300x72x64-bfloat16",
            "1x8x12x4x3-bfloat16",
            "70x70x150x33x20-float16",
        ),
        "test_values": ("200x140x300x72x64-bfloat16", "70x70x150x33x20-float16"),
        "test_pruned_module": ("bfloat16",),
    },
    "sparsity/test_select.py": {
        "test_matmul_2_4": ("13-bfloat16", "8-bfloat16", "11-float16"),
    },
    "sparsity/hopper/test_product.py": {
        "test_values_and_gradients": ("200x320x136-bfloat16",),
        "test_tiles": ("128", "256"),
    },
}
MASKED = {
    "masked/hopper/test_multiply.py": {
        "test_values_and_gradients": ("float16", "one of each"),
        "test_tiles": ("256",),
        "test_parts_of_the_contracted_axis": ("6",),
        "test_drawn_masks_are_those_of_xla": ("shared",),
        "test_under_vmap": ("one w",),
    },
    "masked/test_masked.py": {
        "test_transforms": ("bilinear",),
        "test_temporary_memory_of_fused_grows_by_its_products_alone": (
            "logits-bilinear",
            "all-matmul",
        ),
    },
}
MODELS = {
    "models/test_load.py": {
        # Their tensors have the names of Llama's or of Gemma 3's.
        "test_logits_and_tensors_of_each_family": ("Mistral", "Qwen 3", "Gemma 2"),
    },
    "nn/test_families.py": {
        "test_generation_with_a_cache": (
            "Llama 3.1",
            "Mistral",
            "Qwen 2",
            "StarCoder 2",
            "gated with biases",
        ),
    },
    "nn/test_sharding.py": {
        "test_a_mesh_changes_neither_loss_nor_gradients": (
            "fsdp=4-scanned",
            "fsdp=2,tensor=2-dilated",
            "data=2,fsdp=2,tensor=2-two heads a key",
        ),
    },
    # The op's transforms stay.
    "nn/test_masked.py": {"test_transforms": EVERY},
    "nn/test_quadratic.py": {"test_values_and_gradients": ("second seed",)},
    "nn/test_transformer.py": {
        "test_remat_saves_memory": EVERY,
        "test_ring_attention_inside_shard_map": EVERY,
        "test_bfloat16": ("parameters",),
    },
    "nn/test_generate.py": {
        "test_prompts_of_unequal_length_are_as_alone": ("dilated, no cache",),
        "test_a_stream_is_what_generate_returns": ("no cache",),
    },
}
BENCHMARKS = {
    "benchmarks/test_transformer.py": {
        "test_other_forms": ("dilated",),
        "test_peers_pass_the_same_check": EVERY,
    },
    "benchmarks/test_attention.py": {
        "test_every_kind_of_row_is_right": ("published", "real", "real backward"),
    },
    "benchmarks/test_mlp.py": {
        "test_every_implementation_passes_its_check": (
            "float16-False",
            "float32-False",
        ),
    },
    "benchmarks/test_estimators.py": {"test_every_row_is_right": ("float32",)},
    "benchmarks/test_mlp_model.py": {
        "test_rows_of_kernels": ("matmul",),
    },
    "mosaic/test_x64.py": {
        "test_kernels_are_the_same": (
            "attention",
            "2:4-soft",
            "swiglu",
            "packed mask",
            "flash_mlp",
            "relu2",
            "matmul_2_4",
        ),
    },
    # `make test-oldest` runs these; with the newest packages, other tests run kernels.
    "test_smoke.py": {"test_kernel": EVERY},
}
THOROUGH = ATTENTION | MLP | MASKED | MODELS | BENCHMARKS


def entries_of(file: str, test: str, case: str) -> set[tuple[str, str, str]]:
    """Return the entries that leave out a case of a test in a file below tests/.

    An entry that ends with "-" is the beginning of a name, the others are whole names.
    """
    cases = THOROUGH.get(file, {}).get(test)
    if cases is None:
        return set()
    if cases is EVERY:
        return {(file, test, "")}
    return {
        (file, test, entry)
        for entry in cases
        if case == entry or (entry.endswith("-") and case.startswith(entry))
    }
