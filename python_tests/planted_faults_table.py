"""The faults that planted_faults.py plants, each of a kind that was once made or nearly made.

A row names the file, a text that stands there exactly once, what takes its place, what that breaks, and the tests that
must notice.
"""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]
    each_isa: bool = (
        False  # of the CPU kernels: planted on every vector instruction set, not on one
    )


FORWARD = ("test_linear_4bit.py::test_forward",)
DX = ("test_linear_4bit_dx.py::test_backward",)
LORA = ("test_lora_linear_4bit.py::test_forward",)
LORA_BACKWARD = ("test_lora_linear_4bit_backward.py::test_backward",)
MULTI = ("test_multi_lora_.py",)
GROUPED = ("test_grouped_linear_4bit.py",)
GROUPED_BACKWARD = ("test_grouped_lora_linear_4bit_backward.py",)
MULTI_BACKWARD = ("test_multi_lora_backward.py",)
KERNELS = "csrc/cpu/kernels/"
CUDA = "csrc/cuda/kernels/"

CPU = [
    Fault(
        f"{KERNELS}dequant_panels.inl",
        "if (j0 == source.j0) source.load_row_scales(p0, depth);",
        "if (j0 == source.j0 && p0 == 0) source.load_row_scales(p0, depth);",
        "dx: the second panel of outputs keeps the scales of the first",
        DX, each_isa=True,
    ),
    Fault(
        f"{KERNELS}convert.inl",
        "for (; i < n; ++i) dst[i] = load_one(src, t, offset + i);",
        "for (; i + 1 < n; ++i) dst[i] = load_one(src, t, offset + i);",
        "the last element of a row that is no whole number of vectors is not loaded",
        FORWARD,
    ),
    Fault(
        f"{KERNELS}gemm.inl",
        "float* strip = c + j / kStripWidth * (rows * kStripWidth) + j % kStripWidth;",
        "float* strip = c + j / kStripWidth * kStripWidth + j % kStripWidth;",
        "the second strip of a piece lies over the second row of the first",
        FORWARD, each_isa=True,
    ),
    Fault(
        f"{KERNELS}gemm.inl",
        "for (int64_t j = 0; j < columns; ++j) row[j] *= scale;",
        "for (int64_t j = 0; j < min64(columns, kMicroColumns); ++j) row[j] *= scale;",
        "gradients beyond the first panel of a strip are not scaled",
        LORA_BACKWARD, each_isa=True,
    ),
    Fault(
        f"{KERNELS}dequant_panels.inl",
        "source.scales + (j0 >> source.w.block_shift) - source.first_block;",
        "source.scales + ((j0 - source.j0) >> source.w.block_shift);",
        "dx: blocks are counted from a strip that begins within one",
        DX, each_isa=True,
    ),
    Fault(
        f"{KERNELS}skinny.inl",
        "scale[v] = load(weight.scale(g + v, k0 + 8 * d));",
        "scale[v] = load(weight.scale(g + v, 8 * d));",
        "a later stage of the depth takes the scales of the first",
        FORWARD, each_isa=True,
    ),
    Fault(
        f"{KERNELS}epilogue.inl",
        "for (int64_t k = 0; k < ceil_div(columns, kStripWidth) * rows * kStripWidth; k += kLanes)",
        "for (int64_t k = 0; k < rows * kStripWidth; k += kLanes)",
        "the adapter is scaled in the first strip of a piece only",
        LORA, each_isa=True,
    ),
    Fault(
        f"{KERNELS}dequant.inl",
        "const float absmax = w.nested_absmax[block >> kNestedShift]",
        "const float absmax = w.nested_absmax[first >> kNestedShift]",
        "scales beyond the next multiple of 256 blocks are those of the 256 before",
        (*FORWARD, *DX), each_isa=True,
    ),
    Fault(
        f"{KERNELS}skinny.inl",
        "float* micro_tile = dst + i0 * x.cols + k0 * rows;",
        "float* micro_tile = dst + i0 * x.cols + k0 * height;",
        "the last rows of x, fewer than the others, are interleaved like those",
        FORWARD,  # on AVX-512: elsewhere as many rows as skinny takes are one tile
    ),
    Fault(
        f"{KERNELS}gemv.inl",
        "block = (k >> block_shift) - first;",
        "block = (k - k_begin) >> block_shift;",
        "dx of few rows: blocks are counted from a thread's strip, which begins within one",
        DX, each_isa=True,
    ),
    Fault(
        f"{KERNELS}dequant_panels.inl",
        "blocks = ((j0 + columns - 1) >> w.block_shift) + 1 - first_block;",
        "blocks = ((columns - 1) >> w.block_shift) + 1;",
        "dx: a strip that begins within a block has one block more than is loaded",
        DX, each_isa=True,
    ),
    Fault(
        f"{KERNELS}linear.inl",
        "apply_dropout(a.lora.dropout, i0 + i, j0 + j, width, strip + i * kStripWidth);",
        "apply_dropout(a.lora.dropout, i0 + i, j0, width, strip + i * kStripWidth);",
        "dx: every strip has the mask of the first columns of its piece",
        LORA_BACKWARD, each_isa=True,
    ),
    Fault(
        f"{KERNELS}gemm.inl",
        "a.pack(i0 + i, height(i), p0, n, operand + i * stride);",
        "a.pack(i, height(i), p0, n, operand + i * stride);",
        "a second chunk of rows multiplies the rows of the first",
        FORWARD,
    ),
    Fault(
        f"{KERNELS}gemv.inl",
        "add_chunk(scales + (k >> block_shift), [&](int r) {\n      __builtin_prefetch",
        "add_chunk(scales + k / kChunk, [&](int r) {\n      __builtin_prefetch",
        "few rows: a chunk is taken for a block",
        FORWARD,
    ),
    Fault(
        f"{KERNELS}philox.inl",
        "philox(d, row, static_cast<uint32_t>((begin + k) / 4), word);",
        "philox(d, row, static_cast<uint32_t>(begin / 4), word);",
        "the mask repeats after 64 columns",
        ("test_lora_linear_4bit.py::test_the_mask_is_the_references",),
    ),
    Fault(
        f"{KERNELS}quantize.inl",
        "source.decode(first + j, first + end, scale, tail);",
        "source.decode(first + j, first + end, scales[0], tail);",
        "the end of a short last block of 16-bit weights takes the scale of the first block",
        ("test_dequantize_4bit.py::test_same_bits_as_the_reference",),
    ),
    Fault(
        f"{KERNELS}sgmv.inl",
        "const int64_t stop = min64(end * kDotRanks, of.rank);",
        "const int64_t stop = end * kDotRanks;",
        "S is written past an adapter's rank, from pages that are not its own",
        MULTI,
    ),
    Fault(
        f"{KERNELS}sgmv.inl",
        "for (int64_t k = 0; k < (end - i) * kStripWidth; k += kLanes)",
        "for (int64_t k = 0; k < kStripWidth; k += kLanes)",
        "of neighbours with one adapter only the first row is scaled",
        ("test_multi_lora_linear_4bit.py",),
    ),
    Fault(
        f"{KERNELS}multi.inl",
        "while (++t < plan.tile_count && plan.tiles[t].slot == slot) rows += plan.tiles[t].rows;",
        "",
        "gradients of an adapter with several tiles take the rows of the first",
        MULTI_BACKWARD,
    ),
    Fault(
        "csrc/cpu/simd/avx2.h",
        "_mm256_set1_epi32(0x7fff)",
        "_mm256_set1_epi32(0x8000)",
        "AVX2: rounding to bfloat16 takes ties up",
        ("test_dequantize_4bit.py::test_rounds_to_nearest_even_once",),
    ),
    Fault(
        "csrc/cpu/simd/avx2.h",
        "_mm256_castps_si256(_mm256_cmp_ps(x, t, _CMP_GT_OQ));",
        "_mm256_castps_si256(_mm256_cmp_ps(x, t, _CMP_GE_OQ));",
        "AVX2: the quantizer takes ties up",
        ("test_quantize_4bit.py::test_ties_and_their_neighbours",),
    ),
    Fault(
        "csrc/cpu/simd/neon.h",
        "vdupq_n_u32(0x7fff)",
        "vdupq_n_u32(0x8000)",
        "NEON: rounding to bfloat16 takes ties up",
        ("test_dequantize_4bit.py::test_rounds_to_nearest_even_once",),
    ),
    Fault(
        "csrc/cpu/simd/neon_bf16.h",
        "S < 2 ? vtrn1q_u8(low, high)",
        "S < 1 ? vtrn1q_u8(low, high)",
        "NEON: the second pair of weights is looked up in the place of the fourth",
        FORWARD,
    ),
    Fault(
        "csrc/cpu/amx/amx_gemm.inl",
        "high = load(scales[1] + group * kLanes);",
        "high = load(scales[0] + group * kLanes);",
        "AMX: the second tile of columns takes the scales of the first",
        FORWARD,
    ),
    Fault(
        f"{KERNELS}skinny_pairs.inl",
        "const vf scale = load(weight.scale(g + v, k0 + k));",
        "const vf scale = load(weight.scale(g + v, k0));",
        "bfloat16: all blocks of a stage take the scale of the first",
        FORWARD,
    ),
    Fault(
        f"{KERNELS}gemm_pairs.inl",
        "odd = set1(both ? scales[strip.stride] : 0.0f);",
        "odd = set1(both ? scales[0] : 0.0f);",
        "bfloat16: the second row of a pair has the scales of the first",
        DX,
    ),
    Fault(
        f"{KERNELS}gemv_pairs.inl",
        "dst += m * kLanes;",
        "dst += m;",
        "bfloat16: a second row of x is written over the first",
        FORWARD,
    ),
    Fault(
        "csrc/cpu/simd/avx512_bf16.h",
        "const __mmask64 upper = _mm512_movepi8_mask(at);",
        "const __mmask64 upper = 0;",
        "nested scales of the upper half of their table are those of the lower",
        FORWARD,
    ),
    Fault(
        "csrc/cpu/amx/amx_pairs.inl",
        "storei(panel + q, set1i(0));",
        "storei(panel + q, set1i(0x7fc0));",
        "AMX: dX of bfloat16 gradients meets what was left in a panel's last step",
        DX,
    ),
    Fault(
        "csrc/cpu/amx/amx_int8.inl",
        "(v * kLanes < panel.count ? v : 0) * panel.scale_stride",
        "0 * panel.scale_stride",
        "AMX: bytes of the second tile of columns take the scales of the first",
        ("test_int8_activations.py",),
    ),
    Fault(
        f"{KERNELS}dequant.inl",
        "    first += w.first_block;\n",
        "",
        "every expert has the nested scales of the first",
        GROUPED,
    ),
    Fault(
        f"{KERNELS}dequant.inl",
        "int64_t i = w.first + r * w.K + begin;",
        "int64_t i = r * w.K + begin;",
        "an expert that begins within a block begins with that block",
        GROUPED,
    ),
    Fault(
        f"{KERNELS}linear.inl",
        "  prepare(pool, ceil_div(K, kStage), [&](int64_t begin, int64_t end) {\n"
        "    for (int64_t k = begin * kStage; k < min64(K, end * kStage); k += kStage)\n"
        "      interleave(a.x",
        "  parallel(pool, ceil_div(K, kStage), [&](int64_t begin, int64_t end) {\n"
        "    for (int64_t k = begin * kStage; k < min64(K, end * kStage); k += kStage)\n"
        "      interleave(a.x",
        "a share of an expert lays out its share of x, and multiplies by all of it",
        GROUPED,
    ),
    Fault(
        f"{KERNELS}grouped.inl",
        "first[runs] = count;",
        "first[runs] = count - 1;",
        "the last share of the last expert is not computed",
        GROUPED,
    ),
    Fault(
        f"{KERNELS}grouped.inl",
        "zero_rest(x, a.dx);",
        "(void)0;",
        "dx of rows that belong to no expert is what memory held",
        GROUPED_BACKWARD,
    ),
]  # fmt: skip

GPU = [
    Fault(
        f"{CUDA}gemv.cuh",
        "sums[i][n][j] = __fmaf_rn(block_scale[2 * i + j / 2], sum[i][j], sums[i][n][j]);",
        "sums[i][n][j] = __fmaf_rn(block_scale[2 * i], sum[i][j], sums[i][n][j]);",
        "gemv: half of a tile's rows take the scales of the other half",
        FORWARD,
    ),
    Fault(
        f"{CUDA}gemv.cuh",
        "return slice * slice_chunks + (slice < longer_slices ? slice : longer_slices);",
        "return slice * slice_chunks + (slice < longer_slices ? slice : 0);",
        "gemv: slices of unequal length overlap",
        ("test_cuda_gemv.py",),
    ),
    Fault(
        f"{CUDA}mma_dequant.cuh",
        "s.absmax = ptx::load_const<float>(w_.nested_absmax + (block >> kNestedShift));",
        "s.absmax = ptx::load_const<float>(w_.nested_absmax);",
        "mma: all blocks take the nested scale of the first 256",
        DX,
    ),
    Fault(
        f"{CUDA}mma_dequant.cuh",
        "return static_cast<int64_t>(step) * kMmaDepth + depth_ < (backward ? w_.N : w_.K);",
        "return static_cast<int64_t>(step) * kMmaDepth + depth_ < w_.K;",
        "mma: dx ends its sums as y does",
        ("test_cuda_mma.py",),
    ),
    Fault(
        f"{CUDA}simt_tile.cuh",
        "b_tile[bp * kSimtPitch + bj] = b_in ? p.b.at(p0 + bp, j0 + bj) : 0.0f;",
        "b_tile[bp * kSimtPitch + bj] = b_in ? p.b.at(bp, j0 + bj) : 0.0f;",
        "simt: every step of the depth takes the first rows of the second factor",
        FORWARD,
    ),
    Fault(
        f"{CUDA}quantize.cuh",
        "if (v > midpoints[below + step - 1]) below += step;",
        "if (v >= midpoints[below + step - 1]) below += step;",
        "the quantizer takes ties up",
        ("test_quantize_4bit.py::test_ties_and_their_neighbours",),
    ),
    Fault(
        f"{CUDA}multi_tile.cuh",
        "return int64_t{ids[r / page_rank]} * page_rank + r % page_rank;",
        "return int64_t{ids[0]} * page_rank + r;",
        "pages of an adapter are taken for neighbours",
        MULTI,
    ),
    Fault(
        f"{CUDA}lora.cuh",
        "const int steps = (end - row0 + kLoraRows - 1) / kLoraRows;",
        "const int steps = (end - row0) / kLoraRows;",
        "the last rows, fewer than a tile, are left out of the adapter's products",
        LORA,
    ),
    Fault(
        f"{CUDA}grouped.cuh",
        "const int64_t begin = size ? expert * size : first_row;",
        "const int64_t begin = first_row;",
        "every expert reads the stack from the row on that its rows of the batch begin with",
        GROUPED,
    ),
    Fault(
        f"{CUDA}grouped.cuh",
        "return {before.end, end < before.end ? before.end : end};",
        "return {before.end, end};",
        "an offset that descends gives rows to two experts",
        ("test_cuda_grouped.py",),
    ),
]  # fmt: skip

HOST = [
    Fault(
        "csrc/host/planner.cpp",
        "tile_of_row[row] = segment.tile0 + nth / layout_.tile_rows;",
        "tile_of_row[row] = segment.tile0;",
        "all rows of an adapter name its first tile",
        ("test_planner.py",),
    ),
    Fault(
        "csrc/host/planner.cpp",
        "layout_.tile_count += ceil_div(segment.rows, layout_.tile_rows);",
        "layout_.tile_count += segment.rows / layout_.tile_rows + 1;",
        "a full last tile is followed by an empty one",
        ("test_planner.py",),
    ),
    Fault(
        "csrc/host/page_pool.cpp",
        "free_pages_.insert(free_pages_.end(), evicted.pages.rbegin(), evicted.pages.rend());",
        "free_pages_.insert(free_pages_.end(), evicted.pages.rbegin(), evicted.pages.rend() - 1);",
        "a page of every evicted adapter is lost",
        ("test_page_pool.py",),
    ),
    Fault(
        "csrc/host/page_pool.cpp",
        "while (i) ++slots_[static_cast<size_t>(slots[--i])].pins;",
        "",
        "an unpin that is refused leaves some slots unpinned",
        ("test_page_pool.py",),
    ),
    Fault(
        "csrc/host/page_pool.cpp",
        "if (!slot || slot->generation != (*generations)[i])",
        "if (!slot)",
        "a plan pins the adapter that took the place of its own",
        ("test_page_pool.py", "test_bank.py"),
    ),
]  # fmt: skip

PPO = [
    Fault(
        "lowrank_kernels/rlhf/divergences.py",
        "reward=lambda d: d,",
        "reward=_k3,",
        "the penalty of kl is k3, whose gradient vanishes near the reference",
        ("test_rlhf_divergences.py",),
    ),
    Fault(
        "lowrank_kernels/rlhf/divergences.py",
        "        value=_k3,\n        reward=lambda d: d,",
        "        value=lambda d: d,\n        reward=lambda d: d,",
        "the value of kl is k1, which is negative at half of the tokens",
        ("test_rlhf_divergences.py",),
    ),
    Fault(
        "lowrank_kernels/rlhf/losses.py",
        'return kept(others["mask"])',
        'return torch.ones_like(kept(others["mask"]))',
        "prompts and padding are trained too",
        ("test_rlhf_losses.py",),
    ),
    Fault(
        "lowrank_kernels/rlhf/advantages.py",
        "next_advantage = torch.where(here, advantage, next_advantage)",
        "next_advantage = advantage",
        "advantages go on behind the end of a completion",
        ("test_rlhf_advantages.py",),
    ),
    Fault(
        "lowrank_kernels/rlhf/advantages.py",
        "last = last_kept(keep)",
        "last = (last_kept(keep) + 1).clamp(max=keep.shape[1] - 1)",
        "the score comes one token behind the end",
        ("test_rlhf_advantages.py",),
    ),
    Fault(
        "lowrank_kernels/analysis/spectrum.py",
        "values = _svd(path, A, B)[1] * abs(scaling)",
        "values = _svd(path, A, B)[1]",
        "a spectrum without the adapter's scaling",
        ("test_analysis.py",),
    ),
    Fault(
        "lowrank_kernels/rlhf/rollout.py",
        "kept = (is_end.cumsum(1) - is_end == 0).long()",
        "kept = (is_end.cumsum(1) == 0).long()",
        "the end token is no part of a completion: nothing learns to end",
        ("test_rlhf_pipeline.py",),
    ),
    Fault(
        "lowrank_kernels/rlhf/rollout.py",
        "where[:, : self.prompt_length - 1] = False",
        "where[:, : self.prompt_length] = False",
        "the first token of a completion is not trained",
        ("test_rlhf_pipeline.py",),
    ),
    Fault(
        "lowrank_kernels/rlhf/ppo.py",
        'out["value"][:, :-1], inputs["values"]',
        'out["value"][:, 1:], inputs["values"]',
        "a value trains at the token that it should have foreseen",
        ("test_rlhf_ppo.py",),
    ),
    Fault(
        "lowrank_kernels/rlhf/ppo.py",
        'values = scored["value"][:, :-1]',
        'values = scored["value"][:, 1:]',
        "advantages are relative to the value of the next token",
        ("test_rlhf_ppo.py",),
    ),
    Fault(
        "lowrank_kernels/rlhf/ppo.py",
        "penalty = divergences.reward_penalty(",
        "penalty = divergences.value(",
        "the penalty in the reward is the divergence's value, k3 in place of k1",
        ("test_rlhf_ppo.py",),
    ),
    Fault(
        "lowrank_kernels/rlhf/ppo.py",
        "first = (rollouts * processes + self.accelerator.process_index) * count",
        "first = rollouts * processes * count",
        "all processes sample with the same random numbers",
        ("test_rlhf_ppo.py",),
    ),
    Fault(
        "lowrank_kernels/rlhf/ppo.py",
        "self._count = float(self._sum(of_step.float()[None])[0])",
        "self._count = float(of_step)",
        "each process divides by its own tokens",
        ("test_rlhf_ppo.py",),
    ),
    Fault(
        "lowrank_kernels/rlhf/roles.py",
        "positions = (keep.cumsum(1) - 1).clamp(min=0)",
        "positions = torch.arange(columns, device=ids.device).expand_as(ids)",
        "padding on the left shifts the positions",
        ("test_rlhf_roles.py",),
    ),
    Fault(
        "lowrank_kernels/rlhf/roles.py",
        "last = ids.shape[1] - 1 - keep.flip(1).int().argmax(1)",
        "last = keep.sum(1) * 0 + ids.shape[1] - 1",
        "the reward model scores the padding behind a sequence",
        ("test_rlhf_roles.py",),
    ),
]  # fmt: skip

PYTHON = [
    Fault(
        "lowrank_kernels/adapter.py",
        "return lora_alpha / (math.sqrt(r) if use_rslora else r)",
        "return lora_alpha / r",
        "rsLoRA is scaled as LoRA",
        ("test_nn_lora.py", "test_bank.py"),
    ),
    Fault(
        "lowrank_kernels/functional.py",
        "dweight = (dy.to(weight.dtype).T @ x.to(weight.dtype)).contiguous()",
        "dweight = (x.to(weight.dtype).T @ dy.to(weight.dtype)).T.contiguous() * scaling",
        "the gradient of a dense base is scaled as the adapter's",
        ("test_lora_linear_backward.py::test_gradient_of_the_weight",),
    ),
    Fault(
        "lowrank_kernels/formats.py",
        "blocks = (starts + steps).flatten() // w.blocksize",
        "blocks = starts.flatten() // w.blocksize",
        "a slice of several blocks repeats the scale of the first",
        ("test_slices.py",),
    ),
    Fault(
        "lowrank_kernels/formats.py",
        "and first_block % NESTED_BLOCKSIZE == 0",
        "and True",
        "rows that begin within a nested block keep its scales",
        ("test_slices.py",),
    ),
    Fault(
        "lowrank_kernels/multi_lora/pages.py",
        "self.B[pages[i], :count].copy_(B[:, rows].T)",
        "self.B[pages[i], :count].copy_(B[:, :count].T)",
        "every page of an adapter has the first columns of its B",
        ("test_bank.py", "test_multi_lora.py"),
    ),
    Fault(
        "lowrank_kernels/multi_lora/pages.py",
        "for slot in plan.slots:\n            if self._dropout[slot]:",
        "for slot in plan.slots[:1]:\n            if self._dropout[slot]:",
        "no adapter of a batch has dropout unless the first has",
        ("test_multi_lora.py",),
    ),
    Fault(
        "lowrank_kernels/multi_lora/pages.py",
        "rows += self._ranks[slot]",
        "rows += self._ranks[slots[0]]",
        "gradients of adapters with other ranks than the first overlap",
        ("test_bank.py", "test_multi_lora.py"),
    ),
    Fault(
        "lowrank_kernels/multi_lora/experts.py",
        "permute(2, 1, 0).reshape(N, r * E)",
        "permute(2, 0, 1).reshape(N, r * E)",
        "a stack's gradient of B has its columns by expert, then rank",
        ("test_experts_bank.py",),
    ),
    Fault(
        "lowrank_kernels/multi_lora/experts.py",
        "and self._copied[slot] != _versions(A, B)",
        "and False",
        "pages of a stack keep the values from before a step of an optimizer",
        ("test_experts_bank.py",),
    ),
    Fault(
        "lowrank_kernels/multi_lora/plan.py",
        "if tokens == len(self.names) and self._step is not None:",
        "if tokens == len(self.names):",
        "any matrix of as many rows as there are sequences is a decode step for experts",
        ("test_experts_bank.py",),
    ),
]  # fmt: skip

FAULTS = [*CPU, *GPU, *HOST, *PPO, *PYTHON]
