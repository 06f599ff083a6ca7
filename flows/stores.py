"""The flows `store-ssv2` and `store-rlbench`: a data stage alone, beside the workspace."""

from __future__ import annotations

from prefect import flow

from flows import forms
from flows.pipeline import publish_result, run_experiment
from prelar.config import load_config

Ssv2 = forms.one_of_each("ssv2")
Rlbench = forms.one_of_each("rlbench")
SSV2, RLBENCH = Ssv2(), Rlbench()


@flow(name="store-ssv2")
def ssv2(settings: Ssv2 = SSV2) -> str:  # type: ignore[valid-type]
    """Make the store of Something-Something V2; returns the experiment's name.

    Args:
        settings: Changes to the group ssv2 of params.yaml. What is left empty stays as the file has it.
    """
    return _store("ssv2", settings)


@flow(name="store-rlbench")
def rlbench(settings: Rlbench = RLBENCH) -> str:  # type: ignore[valid-type]
    """Make the store of demonstrations; returns the experiment's name.

    Args:
        settings: Changes to the group rlbench of params.yaml. What is left empty stays as the file has it.
    """
    return _store("rlbench", settings)


def _store(group: str, settings: forms.Form) -> str:
    load_config()
    changes = {f"{group}.{key}": value for key, value in settings.model_dump().items()}
    experiment = run_experiment(changes, (group,))
    publish_result(experiment, changes, whole=False)
    return experiment
