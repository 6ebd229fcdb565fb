"""The cases that a pretraining run has to survive or refuse, what is expected, and the tests that show it.

``pytest -m faults`` runs all of them (tests/conftest.py gives the tests that stand here that marker);
``tools/fault_table.py`` writes the table into docs/failures.md.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One case.

    Attributes:
        number: of the case, from 1.
        case: what happens.
        expected: what comes of it.
        tests: ``FILE::FUNCTION`` below ``tests/``, with all their parameters.
        not_here: which part of it this machine cannot show, and why.
    """

    number: int
    case: str
    expected: str
    tests: tuple[str, ...]
    not_here: str = ""


_BAD = "config/test_bad_input.py::"
_HELPFUL = "config/test_helpful_errors.py::"
_BASE = "config/test_base_and_overrides.py::"
_WORLD = "config/test_world.py::"
_RUNS = "faults/test_runs.py::"
_HANGS = "watch/test_hangs.py::"

CONFIGURATION = (
    Row(
        1,
        "The YAML file has a syntax error, or a tab as indentation",
        "File, line and column; status 2 before torch is imported",
        (f"{_BAD}test_yaml", "test_cli.py::test_a_typo_is_reported_before_torch_is_imported"),
    ),
    Row(2, "A key stands twice", "Refused, with both lines", (f"{_BAD}test_yaml",)),
    Row(
        3,
        "A key or section is unknown or misspelt",
        "Refused, with the nearest key",
        (
            f"{_BAD}test_value",
            f"{_HELPFUL}test_what_is_close_in_spelling_or_meaning_is_suggested",
            f"{_HELPFUL}test_a_misspelt_section_is_not_missing_too",
        ),
    ),
    Row(
        4,
        "A value has the wrong type, or is one that YAML readers disagree about (`3e-4`, `no`, `010`)",
        "Numbers of YAML 1.2; words and octals refused with what to write",
        (f"{_BAD}test_value", f"{_BAD}test_yaml", "config/test_yaml_values.py::test_plain_scalar"),
    ),
    Row(
        5,
        "A required key is missing, the file is empty or a list",
        "The key and an example; never a Python error",
        (f"{_BAD}test_yaml", f"{_BAD}test_value", "config/test_config_fuzz.py::test_any_mapping"),
    ),
    Row(
        6,
        "Settings contradict each other, or one has no effect beside another",
        "Refused, with both keys and the remedy",
        (
            f"{_BAD}test_contradiction_names_both_keys",
            "config/test_ownership.py::test_what_nothing_reads_is_refused",
            "config/test_presets.py::test_settings_that_would_be_ignored_are_refused",
        ),
    ),
    Row(
        7,
        "An override names an unknown key or has no value",
        "Refused as in a file",
        (f"{_BASE}test_bad_override", "config/test_config_fuzz.py::test_any_override"),
    ),
    Row(
        8,
        "The number of processes does not fit the layout",
        "The formula with its numbers, and what would fit",
        (
            f"{_WORLD}test_dp_must_equal_the_world_size",
            f"{_HELPFUL}test_processes_that_tensor_parallelism_does_not_divide",
            "test_launch_mistakes.py::test_a_mistake_is_a_few_lines_with_the_remedy_last",
        ),
    ),
    Row(
        9,
        "Heads, MLP width, vocabulary, layers or sequence cannot be cut as the layout asks",
        "All reasons at once with legal sizes, without a device",
        (
            f"{_HELPFUL}test_all_that_is_against_a_layout_at_once",
            f"{_WORLD}test_what_no_number_of_processes_could_run_is_refused_by_the_file",
            "config/test_operand_blocks.py::test_a_cut_through_a_block_is_refused",
        ),
    ),
    Row(
        10,
        "The global batch is no multiple of micro-batch and replicas",
        "The nearest legal batches",
        (
            f"{_WORLD}test_batch_that_ranks_do_not_divide",
            f"{_WORLD}test_batch_between_two_legal_values_names_the_line",
            "config/test_batch_ramp.py::test_every_stage_must_divide",
        ),
    ),
    Row(
        11,
        "Shapes or devices that FP8 kernels do not take",
        "Shapes are padded, and values kept; what a device cannot do is refused or told in the header",
        (
            "layers/test_linear_recipes.py::test_padding_and_cropping_keep_the_values",
            "training/test_device_rules.py::test_what_the_device_cannot_do",
            "models/test_fp8_plan.py::test_nothing_left_is_an_error",
            "live/test_describe.py::test_the_header_says_what_is_fp8_and_what_is_not",
        ),
        "GPUs without FP8 are pretended",
    ),
)

DATA = (
    Row(
        12,
        "The `.bin` or the `.idx` file is missing",
        "Both paths",
        (
            "data/test_indexed_dataset.py::test_missing_file_lists_both_paths",
            "data/test_loading.py::test_missing_dataset",
        ),
    ),
    Row(
        13,
        "The index is another format, another version, or cut",
        "What it is, or how many bytes are missing",
        (
            "data/test_indexed_dataset.py::test_damaged_index",
            "data/test_indexed_dataset.py::test_truncations_and_bit_flips",
            "data/test_indexed_dataset.py::test_fuzz",
            "data/test_indexed_dataset.py::test_a_header_that_claims_gigabytes_costs_no_memory",
        ),
    ),
    Row(
        14,
        "The `.bin` file is shorter or longer than its index says",
        "Refused when it is opened",
        ("data/test_indexed_dataset.py::test_bin_size",),
    ),
    Row(
        15,
        "A token is negative or not in the vocabulary",
        "Document and place, before it reaches a device",
        (
            "data/test_indexed_dataset.py::test_scan_names_the_document",
            "data/test_indexed_dataset.py::test_scan_finds_negative_tokens",
            "data/test_batches.py::test_token_outside_the_vocabulary",
            "test_launch_mistakes.py::test_the_error_of_one_rank_is_told_once_and_recorded",
        ),
    ),
    Row(
        16,
        "The tokenizer is not the one that the data was made with",
        "Both hashes",
        (
            "data/test_loading.py::test_another_tokenizer",
            "data/test_loading.py::test_blend_of_different_tokenizers",
            "data/test_loading.py::test_changed_tokenizer_file",
            "data/test_tokenizer.py::test_damaged_models_are_usable_or_one_error",
        ),
    ),
    Row(
        17,
        "The dataset is too small for a batch, or a weight of a blend is not positive",
        "What is needed and what is there",
        (
            "data/test_loading.py::test_sizes",
            "data/test_batches.py::test_too_small_for_one_global_batch",
            "data/test_blend.py::test_bad_weights",
            f"{_BAD}test_value",
        ),
    ),
    Row(
        18,
        "Documents are empty, no UTF-8, hold NUL, byte-order marks or one line of many megabytes",
        "Cleaned or left out, and counted",
        (
            "data/test_prepare.py::test_cleaning",
            "data/test_prepare.py::test_bad_documents_are_counted",
            "data/test_prepare.py::test_json_lines",
            "data/test_tokenizer.py::test_weird_texts",
            "test_json_text.py::test_damaged_lines_cost_themselves_alone",
        ),
    ),
)

CHECKPOINTS = (
    Row(
        19,
        "The checkpoint to resume from is not there",
        "An error; only `resume: auto` starts afresh",
        (
            "training/test_stop.py::test_an_explicit_checkpoint_that_is_absent_is_an_error",
            "checkpoint/test_catalog.py::test_an_explicit_path_without_checkpoint_is_an_error",
            "checkpoint/test_catalog.py::test_auto_starts_fresh_where_nothing_is",
        ),
    ),
    Row(
        20,
        "The pointer to the newest checkpoint is empty, garbled or leads nowhere",
        "The newest complete one, with a warning",
        (
            "checkpoint/test_catalog.py::test_a_broken_pointer_falls_back_with_a_warning",
            "checkpoint/test_catalog.py::test_a_missing_or_linked_pointer_falls_back_with_a_warning",
        ),
    ),
    Row(
        21,
        "A file of a checkpoint is cut",
        "Named with both sizes; `auto` takes the one before",
        (
            "checkpoint/test_corruption.py::test_truncation_is_found_with_sizes",
            "checkpoint/test_catalog.py::test_auto_passes_over_damaged_checkpoints_loudly",
        ),
    ),
    Row(
        22,
        "A bit of a checkpoint is flipped",
        "Its SHA-256 finds it, wherever it is",
        (
            "checkpoint/test_corruption.py::test_flipped_bits_anywhere_are_found",
            "checkpoint/test_examine.py::test_fifty_random_bits_over_all_files_are_all_found",
            "training/test_saving.py::test_the_setting_verify_is_honoured",
        ),
    ),
    Row(
        23,
        "A file of a checkpoint is missing, foreign, or its index is gone",
        "Named",
        (
            "checkpoint/test_corruption.py::test_a_missing_file_is_named",
            "checkpoint/test_corruption.py::test_a_foreign_file_is_named",
            "checkpoint/test_round_trip.py::test_mismatches_are_listed_and_nothing_is_touched",
            "checkpoint/test_corruption.py::test_what_a_file_system_or_editor_leaves_is_told_and_not_read",
            "checkpoint/test_altered_content.py::test_file_and_key_are_named",
            "checkpoint/test_altered_content.py::test_every_altered_value_is_one_error_or_none",
        ),
    ),
    Row(
        24,
        "SIGKILL at any moment of a save",
        "The checkpoint before or the new one, both whole; leftovers are swept",
        (
            "checkpoint/test_faults.py::test_kill_at_every_phase",
            "checkpoint/test_faults.py::test_kill_between_the_renames_of_a_replacement",
            "checkpoint/test_faults.py::test_kill_in_the_middle_of_a_retention_delete",
            "checkpoint/test_background.py::test_kill_at_every_phase",
            "training/test_kill.py::test_twenty_kills",
            f"{_RUNS}test_a_fault_costs_the_steps_since_the_last_checkpoint",
            "checkpoint/test_rollback.py::test_a_kill_at_any_moment",
            "training/test_bad_states.py::test_a_rollback_outlives_a_kill_and_is_carried_out_once",
        ),
    ),
    Row(
        25,
        "The disk is full before or during a save",
        "By policy the run stops or goes on; nothing half-written stays, the pointer is as before",
        (
            "checkpoint/test_faults.py::test_a_disk_too_small_is_refused_before_writing",
            "checkpoint/test_faults.py::test_a_disk_that_fills_up_during_the_save",
            "checkpoint/test_background.py::test_a_disk_that_fills_up",
            "training/test_saving.py::test_a_failed_save_stops_the_run",
            "training/test_saving.py::test_a_failed_save_is_tried_again_at_the_next_interval",
            f"{_RUNS}test_a_run_goes_on_where_a_disk_was_full",
            "checkpoint/test_full_disk.py::test_a_disk_that_is_full_at_any_write",
        ),
    ),
    Row(
        26,
        "The run directory cannot be written, or another job is at work in it",
        "An error at the start that names host, process and job",
        (
            "run_dir/test_run_dir.py::test_two_jobs_cannot_share_a_directory",
            "run_dir/test_run_dir.py::test_a_read_only_file_system",
            "run_dir/test_run_dir.py::test_the_lock_of_a_killed_job_is_gone_with_it",
            "run_dir/test_failed.py::test_every_writer_on_a_disk_that_refuses",
            "training/test_endings.py::test_a_run_directory_that_is_taken_away_ends_the_run",
        ),
    ),
    Row(
        27,
        "The run directory holds a run already",
        "Refused, with three ways on",
        (
            "training/test_stop.py::test_an_existing_run_is_refused_and_told_how_to_go_on",
            "run_dir/test_run_dir.py::test_an_existing_run_is_refused_with_the_ways_out",
        ),
    ),
    Row(
        28,
        "A run goes on with another layout",
        "Same logical state, any cut; what cannot be cut is refused",
        (
            "distributed/test_reshard.py::test_a_sample_of_layouts",
            "distributed/test_reshard.py::test_a_cut_through_blocks_is_refused_or_recast",
            "training/test_resume.py::test_a_run_continues_on_another_number_of_ranks",
        ),
    ),
    Row(
        29,
        "A run goes on with other settings",
        "What changed is listed; another model is refused, another training must be accepted by name",
        (
            "training/test_continue.py::test_another_level_is_refused_and_accepted",
            "training/test_continue.py::test_more_steps_are_accepted_by_name",
            "training/test_resume.py::test_another_architecture_is_refused",
            "config/test_changes.py::test_kinds",
            "checkpoint/test_corruption.py::test_another_format_is_no_damage",
        ),
    ),
)

RUNNING = (
    Row(
        30,
        "SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, Ctrl-C or a STOP file, once or twice, at any time",
        "One save at the end of the step, status 0, the same bits after a restart",
        (
            "training/test_stop.py::test_a_stopped_run_saves_exits_0_and_continues",
            "training/test_signals.py::test_all_ranks_stop_together",
            "training/test_signals.py::test_a_second_ctrl_c_ends_the_process_even_if_python_does_not",
            "cli/test_terminal.py::test_a_second_ctrl_c_while_waiting_for_another_rank",
            "training/test_stop.py::test_any_signal_during_the_start_leaves_no_run_that_seems_to_go_on",
            "training/test_endings.py::test_status_and_exit_status_agree",
            f"{_RUNS}test_a_stop_in_any_phase_is_one_save",
        ),
    ),
    Row(
        31,
        "The time limit of the job is near",
        "Saves and ends before it",
        (
            "training/test_time_limit.py::test_a_step_and_a_save_are_reserved",
            "training/test_endings.py::test_status_and_exit_status_agree",
        ),
    ),
    Row(
        32,
        "A rank is killed, crashes or raises",
        "All ranks end; rank and reason come last on the screen and stand in `status.json`",
        (
            "test_launch_mistakes.py::test_a_killed_rank_is_named_by_the_launcher",
            "test_launch_mistakes.py::test_a_job_of_four_ranks_ends_within_ten_seconds_of_its_first_loss",
            "run_dir/test_failed.py::test_the_cause_is_told_in_whichever_order_ranks_write",
            "run_dir/test_failed.py::test_a_rank_of_another_machine_is_waited_for",
            "test_launch_mistakes.py::test_the_error_of_one_rank_is_told_once_and_recorded",
            f"{_HANGS}test_sigkill_ends_all_ranks_within_seconds",
            f"{_RUNS}test_a_fault_costs_the_steps_since_the_last_checkpoint",
        ),
    ),
    Row(
        33,
        "A rank hangs: stopped, asleep, or waiting for data that never come",
        "The watchdog names rank and phase, leaves stacks, and ends the run with status 5",
        (
            f"{_HANGS}test_sigstop_of_one_of_four_ranks",
            f"{_HANGS}test_sigstop_under_the_launch_script",
            f"{_HANGS}test_a_rank_without_data_is_named",
            f"{_HANGS}test_ranks_that_disagree_about_an_evaluation_are_named",
            f"{_HANGS}test_a_single_process_that_hangs_ends_too",
            f"{_HANGS}test_a_suspended_job_goes_on",
            "watch/test_verdict.py::test_the_rank_that_hangs_is_named",
        ),
    ),
    Row(
        34,
        "Memory runs out",
        "What was asked for and what to lower; no rank waits for ever",
        (
            "test_launch_mistakes.py::test_out_of_memory_is_a_few_lines_with_the_remedy_last",
            "training/test_memory.py::test_the_cpu_allocator_is_quoted_in_bytes",
            "training/test_memory.py::test_allocations_beyond_the_address_space_are_known",
            f"{_RUNS}test_a_fault_costs_the_steps_since_the_last_checkpoint",
        ),
        "the messages of CUDA's allocator are pretended",
    ),
    Row(
        35,
        "A loss or gradient is NaN or infinite, on one rank",
        "All ranks skip the step, nothing changes, rank and layer are named; many in a row end with status 3",
        (
            "distributed/test_safeguards.py::test_a_nan_on_one_rank_is_left_out_by_all_as_if_they_were_told_to",
            "distributed/test_safeguards.py::test_a_nan_in_forward_is_traced_to_rank_and_module",
            "step/test_spikes.py::test_too_many_skipped_steps_end_the_run",
            "distributed/test_pipeline.py::test_a_step_that_is_not_finite_changes_nothing_on_any_stage",
            "step/test_clip_norm.py::test_a_gradient_that_is_not_finite_skips_the_step",
            "training/test_bad_states.py::test_weights_that_are_not_finite_replace_no_good_checkpoint",
        ),
    ),
    Row(
        36,
        "The loss or the gradient norm jumps",
        "By policy: told, skipped, or taken back, without its data; a fault of a machine is found",
        (
            "step/test_spikes.py::test_the_threshold_is_where_the_formula_says",
            "step/test_spikes.py::test_warnings_change_no_bit_and_a_skipped_spike_leaves_none",
            "training/test_rollback.py::test_it_trains_on_as_if_the_data_had_never_been_there",
            "training/test_rollback.py::test_the_budget_ends_and_without_a_checkpoint_a_spike_is_skipped",
            "distributed/test_safeguards.py"
            "::test_a_flipped_bit_is_blamed_on_its_rank_and_mended_a_lasting_spike_on_the_data",
        ),
    ),
    Row(
        37,
        "An amax is NaN, infinite or zero, a scale would leave its range",
        "The scale stays, the event is counted under the linear's name",
        (
            "numerics/test_scale_state.py::test_a_non_finite_amax_keeps_the_scale",
            "numerics/test_scale.py::test_clamped_scales_still_do_not_saturate",
            "layers/test_linear_delayed.py::test_non_finite_operands_poison_the_product_and_no_scale",
            "step/test_scale_events.py::test_a_run_logs_them_by_name_and_once_an_interval",
            "live/test_fp8_health.py::test_the_worst_casts_are_named_and_healthy_ones_are_not",
            "distributed/test_recovery.py::test_an_outlier_channel_is_treated_alike_everywhere",
        ),
    ),
    Row(
        38,
        "FP8 scales differ between ranks",
        "The consistency check names them",
        ("distributed/test_consistency.py::test_one_flipped_bit_is_named_on_every_rank",),
    ),
    Row(
        39,
        "Replicas drift apart by one bit",
        "Rank and parameter are named, status 4",
        (
            "distributed/test_consistency.py::test_one_flipped_bit_is_named_on_every_rank",
            "distributed/test_consistency.py::test_two_replicas_accuse_nobody",
            f"{_RUNS}test_a_flipped_bit_of_one_replica_ends_the_run",
        ),
    ),
)

SURROUNDINGS = (
    Row(
        40,
        "A checkpoint holds a pickle that would run code",
        "Refused, nothing runs; of Hugging Face only safetensors are read",
        (
            "checkpoint/test_corruption.py::test_a_malicious_index_is_refused_and_not_executed",
            "checkpoint/test_corruption.py::test_a_malicious_shard_is_refused_and_not_executed",
            "huggingface/test_import.py::test_pickled_weights_are_refused_and_not_opened",
        ),
    ),
    Row(
        41,
        "The YAML file holds a Python tag",
        "Refused, nothing runs",
        (
            f"{_BAD}test_yaml",
            f"{_BAD}test_alias_bomb_is_bounded",
            "config/test_config_fuzz.py::test_any_text",
        ),
    ),
    Row(
        42,
        "A name or a link leads out of its folder",
        "Refused; deletion never follows a link",
        (
            "run_dir/test_run_dir.py::test_names_that_leave_the_folder_are_refused",
            "run_dir/test_run_dir.py::test_overwrite_never_follows_links",
            "checkpoint/test_corruption.py::test_manifest_paths_outside_the_checkpoint_are_refused",
            "checkpoint/test_corruption.py::test_linked_files_and_directories_are_refused",
            "checkpoint/test_catalog.py::test_deleting_does_not_follow_a_link_inside_a_checkpoint",
            "cli/test_bad_paths.py::test_a_name_that_is_too_long",
        ),
    ),
    Row(
        43,
        "Weights & Biases is absent, has no key, does not answer or dies",
        "Training does not wait for it; `metrics.jsonl` is complete",
        (
            "live/test_trackers.py::test_not_installed",
            "live/test_trackers.py::test_no_key",
            "live/test_trackers.py::test_any_call_may_raise",
            "live/test_trackers.py::test_any_call_may_hang",
            "live/test_trackers.py::test_the_run_id_stays",
            "live/test_trackers.py::test_the_real_library_with_a_host_that_does_not_answer",
        ),
    ),
    Row(
        44,
        "The processes do not meet: wrong address, port in use, a machine is missing",
        "The address, how many came and which are missing, and what to check; within the start-up time",
        (
            "comm/test_rendezvous.py::test_who_waits_in_vain_says_who_is_missing",
            "comm/test_rendezvous.py::test_nobody_is_at_the_address",
            "comm/test_rendezvous.py::test_the_port_is_in_use",
            "comm/test_rendezvous.py::test_two_processes_of_one_rank",
            "comm/test_rendezvous.py::test_ranks_that_disagree_how_many_they_are",
            "test_launch_mistakes.py::test_a_wrong_environment_is_refused",
            "test_launch_mistakes.py::test_train_without_a_launcher_refuses_half_an_environment",
        ),
    ),
    Row(
        45,
        "Clocks differ, or a directory shows up late on another machine",
        "Waits for it, within a limit",
        (
            "checkpoint/test_visibility.py::test_a_save_waits_for_what_shows_up_late",
            "checkpoint/test_visibility.py::test_another_rank_waits_until_it_sees_what_rank_0_does",
            "checkpoint/test_visibility.py::test_no_clock_of_another_machine_counts",
        ),
    ),
    Row(
        46,
        "Export of tied embeddings, padded vocabularies and grouped heads",
        "Logits of transformers, every bit after a round trip",
        (
            "huggingface/test_import.py::test_logits_are_those_of_transformers",
            "huggingface/test_import.py::test_master_weights_have_the_bits_of_the_file",
            "huggingface/test_export.py::test_import_and_export_keep_every_bit",
            "huggingface/test_export.py::test_parity_notices_a_wrong_export",
        ),
    ),
    Row(
        47,
        "The validation set is empty, or evaluation fails",
        "Empty: refused before the run. Failed: told, and nothing that was trained is lost",
        (
            "data/test_loading.py::test_sizes",
            f"{_RUNS}test_without_validation_data_nothing_begins",
            f"{_RUNS}test_a_fault_costs_the_steps_since_the_last_checkpoint",
            "distributed/test_levels.py::test_evaluation_moves_no_state",
        ),
    ),
    Row(
        48,
        "The disk of the logs is full; a terminal is narrow, closed, or none; names are not ASCII",
        "A line is lost, not the run; files hold no control codes",
        (
            "live/test_console.py::test_a_full_disk_costs_a_line_not_the_run",
            "training/test_endings.py::test_an_output_without_room_does_not_change_the_exit_status",
            "run_dir/test_failed.py::test_every_writer_on_a_disk_that_refuses",
            "run_dir/test_failed.py::test_a_full_disk_has_room_for_the_status",
            "live/test_console.py::test_a_closed_pipe_does_not_end_the_run",
            "live/test_console.py::test_colour_only_on_a_terminal_that_wants_it",
        ),
    ),
)

ROWS = (*CONFIGURATION, *DATA, *CHECKPOINTS, *RUNNING, *SURROUNDINGS)


def all_tests() -> frozenset[str]:
    """Every test of the table."""
    return frozenset(test for row in ROWS for test in row.tests)
