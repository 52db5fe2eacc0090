"""The reverse SDE, by a predictor and a corrector."""

from dataclasses import dataclass
from functools import partial

from configs.keys import check_positive
from configs.schema import Flag, Key, Number, OneOf, whole
from methods.restoration import RESTORERS, Replacement
from samplers import base
from samplers.base import Sampler, choose
from solvers.solve import solve_sde

KEYS = {
    "sampling.predictor": Key(
        "euler_maruyama", OneOf(registry="solvers.predictor_corrector.PREDICTORS"), "of 'pc'"
    ),
    "sampling.corrector": Key(
        "none", OneOf(registry="solvers.predictor_corrector.CORRECTORS"), "of 'pc'"
    ),
    "sampling.probability_flow": Key(
        False, Flag(), "the predictor follows the ODE instead of the SDE"
    ),
    "sampling.n_steps_each": Key(1, whole(1, 10**5), "corrector steps per noise level"),
    "sampling.snr": Key(0.16, Number(1e-6, 1000), "signal-to-noise ratio of the corrector"),
}


@dataclass(frozen=True, kw_only=True)
class PCSampler(Sampler):
    """The reverse SDE, by a predictor and a corrector.

    Attributes:
        predictor, corrector, n_steps_each, snr, probability_flow: see `predictor_corrector`.
    """

    predictor: str = "euler_maruyama"
    corrector: str = "none"
    n_steps_each: int = 1
    snr: float = 0.16
    probability_flow: bool = False

    keys = KEYS | base.KEYS
    options = Sampler.options | {
        name: f"sampling.{name}"
        for name in ("predictor", "corrector", "n_steps_each", "snr", "probability_flow")
    }

    @classmethod
    def words(cls, values):
        return (f"{values.get('predictor')} and {values.get('corrector')}",)

    def check(self):
        if not self.method.predictors:
            raise ValueError(f"{self.method.name} has no sampling.method='pc': it has no SDE")
        choose("predictor", self.predictor, self.method.predictors, self.method)
        choose("corrector", self.corrector, self.method.correctors, self.method)
        self.method.check_chain()
        if self.corrector != "none":
            check_positive(self, "n_steps_each", "snr")
        elif self.predictor == "none":
            raise ValueError("sampling.predictor and sampling.corrector are both 'none'")
        if self.predictor == "ancestral_sampling" and self.probability_flow:
            raise ValueError("sampling.predictor='ancestral_sampling' has no probability_flow")
        if self.start:
            raise ValueError("sampling.init='condition' needs an ODE: sampling.method='ode'")
        if self.measurement is not None:
            self._check_restorer()

    def _check_restorer(self) -> None:
        if RESTORERS[self.restorer] is not None:
            if self.resample > 1:
                raise ValueError(
                    "sampling.restore_resample above 1 needs sampling.restorer='replacement'"
                )
            return
        if self.predictor == "none" and self.resample > 1:
            raise ValueError("sampling.restore_resample above 1 needs a sampling.predictor")
        draws = self.predictor != "none" and not self.probability_flow
        if self.measurement.noise > 0 and not draws:
            raise ValueError(
                "sampling.restorer='replacement' with sampling.restore_noise needs a predictor "
                "(not sampling.predictor='none') and no sampling.probability_flow"
            )

    @property
    def couples_samples(self) -> bool:
        return self.corrector != "none"

    @property
    def tells_times(self) -> bool:
        return True

    @property
    def integrate(self):
        replaces = self.measurement is not None and RESTORERS[self.restorer] is None
        return partial(
            solve_sde,
            self.method,
            predictor=self.predictor,
            corrector=self.corrector,
            n_steps_each=self.n_steps_each,
            snr=self.snr,
            probability_flow=self.probability_flow,
            noise_removal=self.noise_removal,
            constrain=Replacement(self.method, self.measurement) if replaces else None,
            resample=self.resample if replaces else 1,
        )
