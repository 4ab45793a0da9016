"""The paper's own search (appendix C): activation, batch size and learning rates, with optuna."""

from __future__ import annotations

from typing import Any

from transformers import set_seed

from paper_grid.models import make_model
from paper_grid.plan import Run
from paper_grid.rates import default_rates, tuned_name, with_rates
from paper_grid.training import Workshop, environment, quiet

ACTIVATIONS = ["relu", "leaky_relu", "silu", "tanh", "gelu"]
BATCH_SIZES = [8, 16, 32, 64]
BACKBONE_LRS = {"frozen": [5e-5], "lora": [3e-4, 1e-3, 2e-3, 5e-3], "full": [1e-5, 2e-5, 3e-5, 5e-5]}
ADAPTER_LRS = [1e-3, 3e-3, 1e-2, 2e-2]


def tune(workshop: Workshop, run: Run, count: int) -> dict[str, Any]:
    """Searches for the method of `run` and stores the best of `count` trials, which later runs then use.

    Args:
        workshop: Trains.
        run: Task, backbone, mode, method and placement are taken from it; its seed is the search's.
        count: Trials.

    Raises:
        ModuleNotFoundError: optuna is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "this search needs optuna: pip install 'badge-peft[train]'.", name="optuna"
        ) from error
    base = with_rates(run.settings, default_rates(workshop.settings, run.settings["mode"]))

    def model_init(trial: Any) -> Any:
        chosen = trial.params if trial is not None else {}
        set_seed(base["seed"])
        activation = chosen.get("activation", base["adapter"]["activation"])
        one = {**base, "adapter": {**base["adapter"], "activation": activation}}
        return make_model(one, workshop.path(base), workshop.data(base))

    def space(trial: Any) -> dict[str, Any]:
        if base["adapter"]["placement"] != "none":
            trial.suggest_categorical("activation", ACTIVATIONS)
        return {
            "adapter_learning_rate": trial.suggest_categorical("adapter_lr", ADAPTER_LRS),
            "per_device_train_batch_size": trial.suggest_categorical("per_device_train_batch_size", BATCH_SIZES),
            "learning_rate": trial.suggest_categorical("learning_rate", BACKBONE_LRS[base["mode"]]),
        }

    with workshop.store.scratch() as folder, quiet():
        trainer = workshop.trainer(base, folder, model_init=model_init)
        best = trainer.hyperparameter_search(
            hp_space=space,
            backend="optuna",
            direction="maximize",
            n_trials=count,
            compute_objective=lambda metrics: metrics["eval_s_avg"],
            sampler=optuna.samplers.TPESampler(seed=base["seed"]),
        )
    found = dict(best.hyperparameters)
    chosen = {
        "adapter_lr": found["adapter_lr"],
        "backbone_lr": found["learning_rate"],
        "batch_size": found["per_device_train_batch_size"],
        **({"activation": found["activation"]} if "activation" in found else {}),
    }
    result = {"best": chosen, "s_avg": best.objective, "trials": count, "environment": environment()}
    workshop.store.write_tuned(tuned_name(run.settings), result)
    return result
