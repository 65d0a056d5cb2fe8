"""What differs between the supported megatron-core versions, and what their wheels got wrong.

Each entry names the version that ends it; when `setup.py` requires that version, the entry goes.
"""

import argparse
import gc
import importlib.util
import queue

import torch


def apply_repairs() -> None:
    """Apply every entry below that repairs; entry points call it after `cpu.enable`, to parse next.

    A second call changes nothing.
    """
    skip_compile_helpers()
    keep_synchronous_saves_in_process()
    repair_distributed_optimizer_resume()
    zero_padding_of_optimizer_buckets()


def repair_help(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Return the parser with help texts that argparse can print.

    One of Megatron's has a bare percent sign, on which --help dies. Open in 0.19.2.
    """
    for action in parser._actions:
        try:
            parser._get_formatter()._expand_help(action)
        except (TypeError, ValueError, KeyError):
            action.help = action.help.replace("%", "%%")
    return parser


def skip_compile_helpers() -> None:
    """Keep Megatron from running `make` for the dataset helpers where they are installed compiled.

    The wheel ships `helpers_cpp` without the Makefile that builds it, so that every start from a
    PyPI install would end there. Not fixed in 0.19.2, the newest release when this was written.
    """
    import megatron.core.datasets.utils as datasets_utils

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        datasets_utils.compile_helpers = lambda: None


def keep_synchronous_saves_in_process() -> None:
    """Give synchronous checkpoint saves a queue of this process for their results.

    Upstream opens a `multiprocessing` manager for it, in a spawned process that imports the main
    script again: seconds at the first save, and a script without `if __name__ == "__main__"` hangs.
    Only asynchronous saves write in another process; they keep upstream's. Not changed in 0.19.2.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training import global_vars

    upstream = filesystem_async.get_write_results_queue
    if getattr(upstream, "is_in_process", False):
        return
    in_process: queue.Queue = queue.Queue()

    def get_write_results_queue(*args, **kwargs):
        args_of_run = global_vars._GLOBAL_ARGS
        if args_of_run is not None and args_of_run.async_save:
            return upstream(*args, **kwargs)
        return in_process

    get_write_results_queue.is_in_process = True
    filesystem_async.get_write_results_queue = get_write_results_queue


def repair_distributed_optimizer_resume() -> None:
    """Let `--use-distributed-optimizer` resume with torch's Adam, that is without Apex and TE.

    Upstream asserts on a fresh optimizer, which has no step count yet; then, or when that is
    bridged, it loses the count without a word: it overwrites the loaded one, and hands one tensor
    to all parameters, which Adam advances once for each of them. Open in 0.19.2.
    """
    from megatron.core.optimizer import distrib_optimizer

    optimizer_class = distrib_optimizer.DistributedOptimizer
    if distrib_optimizer.HAVE_APEX_OR_TE or hasattr(optimizer_class, "is_resume_repaired"):
        return
    state_dict, load_state_dict = optimizer_class.state_dict, optimizer_class.load_state_dict
    set_states = optimizer_class._set_main_param_and_optimizer_states

    def state_dict_of_fresh_or_used(self):
        if isinstance(self.optimizer, torch.optim.Adam) and not self.optimizer.state:
            self.init_state_fn(self.optimizer)
            for state in self.optimizer.state.values():
                state["step"] = torch.tensor(0.0)
        return state_dict(self)

    def load_with_a_step_for_each(self, loaded):
        load_state_dict(self, loaded)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    def set_all_but_step(self, model_param, tensors):
        # The parameters are leaves that require gradients.
        with torch.no_grad():
            set_states(self, model_param, {**tensors, "step": None})

    optimizer_class.state_dict = state_dict_of_fresh_or_used
    optimizer_class.load_state_dict = load_with_a_step_for_each
    optimizer_class._set_main_param_and_optimizer_states = set_all_but_step
    optimizer_class.is_resume_repaired = True


def zero_padding_of_optimizer_buckets() -> None:
    """Save zeros between the parameters of the distributed optimizer's buckets.

    Upstream saves `torch.empty` there, so that two equal runs have different checkpoints, with
    whatever lay in memory. Open in 0.19.2 (core/optimizer/distrib_optimizer.py,
    sharded_param_state_dp_reshardable).
    """
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    upstream = DistributedOptimizer.sharded_param_state_dp_reshardable
    if hasattr(upstream, "has_zero_padding"):
        return

    def sharded_param_state_dp_reshardable(self, *args, **kwargs):
        state = upstream(self, *args, **kwargs)
        buckets = [state[index] for index in range(len(self.gbuf_ranges))]
        in_dtypes = [in_dtype for bucket in buckets for in_dtype in bucket.values()]
        parts = [part for in_dtype in in_dtypes for bucket in in_dtype for part in bucket]
        for part in parts:
            if part["padding"].unwrap():
                for entry in part.values():
                    if isinstance(entry, ShardedTensor):
                        entry.data.zero_()
        return state

    sharded_param_state_dp_reshardable.has_zero_padding = True
    DistributedOptimizer.sharded_param_state_dp_reshardable = sharded_param_state_dp_reshardable


def reset_megatron_state() -> None:
    """Undo what `pretrain()` left in this process, so that the next call starts as in a new one.

    Every rank must call it. The default process group stays; those Megatron made are destroyed.
    No release of megatron-core does this in one call (0.19.2 has the pieces used here).
    """
    _destroy_globals()
    _destroy_groups()
    _destroy_trackers()
    # Models and groups refer to each other in cycles, and gloo's threads end when a group is freed.
    gc.collect()


def _destroy_globals() -> None:
    import megatron.core.config as core_config
    import megatron.training.checkpointing as checkpointing
    import megatron.training.training as training_loop
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.training import global_vars

    if global_vars._GLOBAL_SIGNAL_HANDLER is not None:
        global_vars._GLOBAL_SIGNAL_HANDLER.release()
    if global_vars._GLOBAL_TENSORBOARD_WRITER is not None:
        global_vars._GLOBAL_TENSORBOARD_WRITER.close()
    global_vars.destroy_global_vars()
    destroy_num_microbatches_calculator()
    destroy_rerun_state_machine()
    core_config.set_experimental_flag(False)
    checkpointing._CHECKPOINT_VERSION = None
    checkpointing._LOADED_ITERATION = None
    training_loop.num_checkpoints_memory_reported = 0


def _destroy_groups() -> None:
    from megatron.core import parallel_state

    groups = parallel_state._global_process_group_list or []
    parallel_state.destroy_model_parallel()
    known = torch.distributed.distributed_c10d._world.pg_map
    for group in groups:
        if group is not None and group in known:
            torch.distributed.destroy_process_group(group)


def _destroy_trackers() -> None:
    from megatron.core.tensor_parallel import random as tensor_parallel_random
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.core.transformer.moe.router_replay import RouterReplay
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    tensor_parallel_random._CUDA_RNG_STATE_TRACKER = None
    tensor_parallel_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
    MTPLossLoggingHelper.tracker.clear()
    destroy_moe_metrics_tracker()
    RouterReplay.clear_global_router_replay_instances()
