"""What docs/coverage.md says: family x task, input, output, option; the test that shows it, or why there is none.

`python -m tests.coverage_rows > docs/coverage.md` writes the page; tests/test_coverage.py checks that every named test
exists and that the page is this table.
"""

from __future__ import annotations

from dataclasses import dataclass, field

FAMILIES = ("gpt2", "gpt_neox", "gpt_neox_japanese", "mpt", "gpt_bigcode", "llama")
SHORT = {"gpt_neox_japanese": "japanese", "gpt_neox": "neox", "gpt_bigcode": "bigcode"}
HERE = "tests/tp_decoders/"
PARITY = HERE + "families/test_parity.py::test_logits_loss_and_all_gradients_equal_the_reference"
PADDED = HERE + "padded/test_padded_model.py::test_outputs_loss_and_gradients_equal_transformers"
EQUALITIES = HERE + "padded/test_padded_equalities.py::test_results_do_not_depend_on"
TASKS = HERE + "tasks/test_task_outputs.py::test_outputs_losses_and_all_gradients_equal_the_reference"
NOT_AN_OPTION = "not an option of this family"


@dataclass(frozen=True)
class Row:
    """One line. `ids` maps a family to the bracketed part of the test's id; "" where the test has none."""

    area: str
    what: str
    test: str
    ids: dict[str, str]
    why: dict[str, str] = field(default_factory=dict)  # why a family has no test here
    otherwise: str = NOT_AN_OPTION

    def tests(self) -> list[str]:
        return [f"{self.test}[{i}]" if i else self.test for i in self.ids.values()]

    def cell(self, family: str) -> str:
        return "yes" if family in self.ids else self.why.get(family, self.otherwise)


def every(pattern: str) -> dict[str, str]:
    """{f} is the family, {s} its short name."""
    return {family: pattern.format(f=family, s=SHORT.get(family, family)) for family in FAMILIES}


def only(**ids: str) -> dict[str, str]:
    return ids


def _padded(what: str, feature: str, **why: str) -> Row:
    ids = {family: i for family, i in every(f"{{f}}-{feature}").items() if family not in why}
    return Row("inputs and outputs", what, PADDED, ids, why)


def _option(what: str, otherwise: str = NOT_AN_OPTION, **cases: str) -> Row:
    return Row("options", what, PARITY, cases, {}, otherwise)


NO_TOKEN_TYPES = "the reference takes none"
NO_POSITIONS = "the reference takes none: ALiBi is a function of distance"
NO_CROSS = "the reference has no cross-attention"
NO_CLASS = "the reference gives GPT-2 alone this head"
ROWS = (
    Row("tasks", "causal language model: logits, loss, every gradient", PARITY, every("{s}")),
    Row("tasks", "the same, computed in padded batches", PADDED, every("{f}-right padding")),
    Row("tasks", "generation: greedy = generate", "tests/cluster/engine/test_generation.py::"
        "test_greedy_generation_equals_transformers_token_for_token", every("plain-{f}")),
    Row("tasks", "sequence classification: single label, multi-label, regression", TASKS, every("{f}")),
    Row("tasks", "token classification", TASKS, every("{f}")),
    Row("tasks", "span question answering", TASKS, only(**{f: i for f, i in every("{f}").items() if f != "llama"}),
        {"llama": "transformers names the decoder's tensors otherwise there; refused"}),
    Row("tasks", "double heads, every summary_type and projection option", TASKS, only(gpt2="gpt2"), {}, NO_CLASS),
    Row("tasks", "these heads in batches padded on the right",
        HERE + "padded/test_padded_tasks.py::test_padded_outputs_losses_and_gradients_equal_the_reference",
        every("right-{f}")),
    Row("tasks", "these heads in batches padded on the left",
        HERE + "padded/test_padded_tasks.py::test_padded_outputs_losses_and_gradients_equal_the_reference",
        every("left-{f}")),
    Row("tasks", "a loop over padded calls = generate",
        HERE + "padded/test_padded_generation.py::test_a_loop_over_padded_calls_generates_what_transformers_does",
        every("{f}")),
    Row("tasks", "task checkpoints: save, transformers, load", HERE + "tasks/test_task_outputs.py::"
        "test_what_is_saved_opens_in_transformers_and_heads_cost_no_collective", every("{f}")),
    _padded("attention_mask, left padding", "left padding"),
    _padded("attention_mask, right padding", "right padding"),
    _padded("attention_mask with gaps", "gaps in the mask"),
    Row("inputs and outputs", "attention_mask of four axes, bool",
        HERE + "padded/test_attention_mask.py::test_a_mask_of_four_axes_equals_transformers", every("{f}-bool")),
    Row("inputs and outputs", "attention_mask of four axes, added to the scores, by head",
        HERE + "padded/test_attention_mask.py::test_a_mask_of_four_axes_equals_transformers",
        {family: f"{family}-added by head, cached" for family in FAMILIES if family != "mpt"},
        {"mpt": "the reference reads its numbers as 0 and 1, and takes none by head"}),
    _padded("position_ids", "position_ids", mpt=NO_POSITIONS),
    _padded("token_type_ids", "token_type_ids", gpt_neox=NO_TOKEN_TYPES, gpt_neox_japanese=NO_TOKEN_TYPES,
            mpt=NO_TOKEN_TYPES, llama=NO_TOKEN_TYPES),
    _padded("head_mask per layer", "head_mask per layer"),
    _padded("head_mask shared by layers", "head_mask shared by layers"),
    _padded("inputs_embeds", "inputs_embeds"),
    _padded("past key/values in and out, left padding", "past, left padding"),
    _padded("past key/values in and out, right padding", "past, right padding"),
    Row("inputs and outputs", "a DynamicCache of transformers, in and out",
        HERE + "padded/test_transformers_cache.py::test_a_dynamic_cache_grows_as_transformers_own_does", every("{f}")),
    Row("inputs and outputs", "an EncoderDecoderCache of transformers",
        HERE + "padded/test_transformers_cache.py::test_with_an_encoder_both_caches_are_in_one", only(gpt2=""), {
            "gpt_bigcode": "the same code; transformers 4.57 cannot run it"}, NO_CROSS),
    _padded("output_attentions, output_hidden_states, use_cache", "attentions, hidden states and cache"),
    _padded("gradients through attentions and hidden states", "gradients through attentions and hidden states"),
    Row("inputs and outputs", "left-padded = right-padded = unpadded", EQUALITIES,
        every("left-padded = right-padded = unpadded-{f}")),
    Row("inputs and outputs", "cached = uncached", EQUALITIES, every("cached = uncached-{f}")),
    Row("inputs and outputs", "both input_ids and inputs_embeds is refused",
        HERE + "padded/test_padded_refusals.py::test_is_refused_by_every_family", every("both inputs-{f}")),
    Row("inputs and outputs", "encoder_hidden_states, encoder_attention_mask (cross-attention)",
        HERE + "model/test_cross_attention.py::test_cross_attention_equals_the_reference",
        only(gpt2="encoder_attention_mask by state, left padding-gpt2",
             gpt_bigcode="encoder_attention_mask by state, left padding-gpt_bigcode"), {}, NO_CROSS),
    Row("inputs and outputs", "past with an encoder's keys and values",
        HERE + "model/test_cross_attention.py::test_a_cached_call_takes_the_encoders_keys_and_values_from_the_past",
        only(gpt2="states-gpt2", gpt_bigcode="states-gpt_bigcode"), {}, NO_CROSS),
    Row("inputs and outputs", "an encoder for a model without cross-attention is refused",
        HERE + "padded/test_padded_refusals.py::test_is_refused_by_every_family", every("an encoder-{f}")),
    Row("inputs and outputs", "packed documents = documents alone",
        HERE + "families/test_packed.py::test_a_packed_row_is_its_documents_alone", every("{s}-2")),
    _option("scale_attn_weights off", gpt2="gpt2 unscaled", gpt_bigcode="bigcode unscaled"),
    _option("scale_attn_by_inverse_layer_idx", gpt2="gpt2 inverse layer scale"),
    _option("reorder_and_upcast_attn", gpt2="gpt2 upcast"),
    _option("attention_softmax_in_fp32, scale_attention_softmax_in_fp32", gpt_bigcode="bigcode softmax flags"),
    _option("multi_query off / multi-query on", gpt_bigcode="bigcode multi-head", mpt="mpt multi-query",
            llama="llama multi-query"),
    _option("key/value heads of groups of queries: 2 of 14, 3 of 6, 5 of 25, 8 of 16", llama="llama 2 of 14 heads"),
    _option("query and key norms by head (Qwen3), biases of q, k and v alone (Qwen2)", llama="qwen3"),
    _option("odd width of the MLP", "fixed multiple of the width", gpt2="gpt2 odd mlp", gpt_bigcode="bigcode unscaled",
            mpt="mpt expansion", gpt_neox="neox", llama="llama gelu"),
    _option("sequential residual", "always sequential", gpt_neox="neox sequential"),
    _option("attention_bias off", gpt_neox="neox no attention bias", llama="llama"),
    _option("rotary_pct and base", gpt_neox="neox full rotary", gpt_neox_japanese="japanese narrow",
            llama="llama llama3"),
    _option("tied or untied head", mpt="mpt untied", gpt2="gpt2 untied", gpt_neox="neox tied",
            gpt_bigcode="bigcode untied", gpt_neox_japanese="japanese untied", llama="llama biases"),
    _option("ALiBi off, learned positions", mpt="mpt learned positions"),
    _option("no_bias off, logit_scale", mpt="mpt biases"),
    _option("qk_ln, clip_qkv", mpt="mpt query-key norm"),
    _option("head counts that do not divide (3 heads)", gpt2="gpt2 3 heads", gpt_neox="neox 3 heads",
            gpt_bigcode="bigcode 3 heads", mpt="mpt 3 heads", gpt_neox_japanese="japanese 3 heads",
            llama="llama 3 of 6 heads"),
    _option("linear and dynamic rope scaling", gpt_neox="neox dynamic scaling",
            gpt_neox_japanese="japanese linear scaling", llama="llama dynamic"),
    _option("rope scalings llama3 and yarn", llama="llama yarn"),
    Row("options", "drawn at random: every option, activation and head count together",
        HERE + "fuzz/test_fuzz.py::test_no_drawn_configuration_is_silently_different", every("")),
    Row("options", "padded calls drawn at random: every input, task, cache and mistake together",
        HERE + "fuzz/test_fuzz.py::test_no_drawn_padded_call_is_silently_different", every("")),
    Row("options", "head pruning",
        HERE + "model/test_pruning.py::test_a_checkpoint_with_pruned_heads_equals_transformers",
        only(gpt2="gpt2-past"), {}, "the reference prunes GPT-2's heads alone"),
    Row("options", "cross-attention: save, transformers, load",
        HERE + "model/test_cross_attention.py::test_what_is_saved_is_what_transformers_loads",
        only(gpt2="gpt2", gpt_bigcode="gpt_bigcode"), {}, NO_CROSS),
    Row("options", "heads pruned after loading: save, transformers, load",
        HERE + "model/test_pruning.py::test_heads_taken_out_of_a_loaded_model_are_gone_in_transformers_too",
        only(gpt2=""), {}, "the reference prunes GPT-2's heads alone"),
    Row("options", "dropout everywhere the reference has it",
        HERE + "families/test_dropout.py::test_loss_and_gradients_equal_transformers_under_the_same_masks",
        every("{f}")),
    Row("options", "initialisation by the family's rule",
        HERE + "checkpoint/test_initialise.py::test_every_tensor_has_the_spread_that_transformers_gives_it",
        every("{f}")),
    Row("options", "gradient checkpointing, sequence parallelism",
        HERE + "padded/test_padded_equalities.py::"
        "test_gradients_and_outputs_do_not_depend_on_recomputation_or_division", every("{f}")),
    Row("options", "LoRA adapters, to PEFT",
        HERE + "adapters/test_adapters.py::test_an_adapter_written_here_gives_peft_the_same_logits", every("{f}")),
    Row("options", "LoRA adapters, from PEFT", HERE + "adapters/test_adapters.py::"
        "test_an_adapter_written_by_peft_gives_the_same_logits_here_beside_the_weights_and_merged", every("{f}")),
    Row("options", "beams = transformers' beams, groups included: 52 random searches",
        "tests/cluster/engine/beams/test_beam_search.py::"
        "test_a_random_search_equals_transformers_token_for_token_and_in_score",
        only(gpt2="gpt2-0", gpt_neox="gpt_neox-1", gpt_neox_japanese="gpt_neox_japanese-2", mpt="mpt-3",
             gpt_bigcode="gpt_bigcode-4", llama="llama-5")),
    Row("options", "beams on two ranks, bit for bit", "tests/cluster/engine/beams/test_beam_search.py::"
        "test_the_random_searches_have_the_same_bits_on_two_ranks", every("{f}")),
    Row("options", "fill-in-the-middle prompts, both orders", "tests/cluster/rpc/services/test_beams.py::"
        "test_a_hole_is_filled_as_transformers_continues_the_same_tokens_in_both_orders", only(gpt_bigcode=""), {},
        "GPT-BigCode alone has the tokens that mark a hole"),
    Row("options", "original TensorFlow checkpoints",
        HERE + "convert/test_gpt2_tensorflow.py::test_the_logits_are_those_that_tensorflow_computed", only(gpt2=""), {},
        "GPT-2 alone was published in this format"),
    Row("options", "original DeepSpeed checkpoints", HERE + "convert/test_deepspeed.py::"
        "test_the_parts_make_the_model_they_were_cut_from", only(gpt_neox="{}-3"), {},
        "GPT-NeoX alone was published in this format"),
)  # fmt: skip


def page() -> str:
    """The whole of docs/coverage.md."""
    lines = [
        "# What is covered",
        "",
        "Written by `python -m tests.coverage_rows > docs/coverage.md` and checked by `make test`: every test that is",
        "named here exists; sizes run from one to three ranks where a model is divided. A cell without `yes` says why",
        "there is nothing to show.",
    ]
    for area in dict.fromkeys(row.area for row in ROWS):
        lines += ["", f"## {area.capitalize()}", ""]
        lines += ["| | " + " | ".join(FAMILIES) + " | test |", "| --- " * (len(FAMILIES) + 2) + "|"]
        for row in (row for row in ROWS if row.area == area):
            cells = " | ".join(row.cell(family) for family in FAMILIES)
            lines.append(f"| {row.what} | {cells} | `{row.test.removeprefix('tests/')}` |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
