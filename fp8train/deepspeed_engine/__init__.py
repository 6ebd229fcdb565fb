"""DeepSpeed as the engine of a run (``engine: deepspeed``): its ZeRO-1 to 3 and offload, around our model.

DeepSpeed keeps gradients, master weights and their partition, and writes the model's weights. Model, recipes,
data, logging, evaluation and the format of checkpoints are ours, so that a run can go on with either engine.

* :mod:`~fp8train.deepspeed_engine.settings` makes DeepSpeed's JSON of the configuration;
* :mod:`~fp8train.deepspeed_engine.trainer` runs steps;
* :mod:`~fp8train.deepspeed_engine.exchange_states` brings masters and moments to checkpoints and back.

DeepSpeed itself is imported when a trainer is made, not before.
"""
