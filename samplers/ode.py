"""The sampling ODE, by a solver with fixed, fitted or adaptive steps."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

from configs.keys import check_positive
from configs.schema import Key, Number, OneOf, whole
from methods.restoration import RESTORERS
from samplers import base, start
from samplers.base import Sampler, choose
from solvers import FITTED, SCHEDULES, SOLVERS, solver_named
from solvers.fitted import FINE_STEPS, Fit
from solvers.fixed_steps import Churn
from solvers.rk45 import limits_of
from solvers.solve import solve_ode

KEYS = {
    "sampling.ode_solver": Key(
        "rk45",
        OneOf(("fitted",), "solvers.SOLVERS"),
        "of 'ode': 'rk45' is adaptive, the others take N steps; 'fitted': steps made for the "
        "checkpoint at hand, for 5 to 10 evaluations where many samples are drawn",
    ),
    "sampling.N": Key(
        100,
        whole(1, 10**5),
        "steps of the solvers that are not adaptive; 'pc' takes model.num_scales",
    ),
    "sampling.schedule": Key(
        "auto",
        OneOf(("auto", "fitted"), "solvers.SCHEDULES"),
        "where the steps lie: 'uniform' in the method's time, 'polynomial' in the noise level, "
        "with rho, 'logsnr' in its log; 'fitted': where trajectories of the checkpoint bend, at "
        "most 60 steps; 'auto': the schedule that belongs to the solver",
    ),
    "sampling.rho": Key(
        7.0, Number(0.1, 1000), "of 'polynomial': the larger, the more steps are close to the data"
    ),
    "sampling.order": Key(
        None,
        whole(1, 4),
        "of 'multistep', 'ipndm' and 'fitted', 1 to 4, 'dpmpp' and 'unipc', 1 to 3, at most N; "
        "None: 3",
    ),
    "sampling.S_churn": Key(
        0.0,
        Number(0, 1000),
        "'heun' and 'improved_euler', of PFGM++, EDM and SDEs: noise added on the way, with the "
        "levels raised by the share S_churn / N; 0: none, the ODE",
    ),
    "sampling.S_min": Key(
        0.0, Number(0, 1e6), "smallest noise level at which noise is added", scales="level"
    ),
    "sampling.S_max": Key(
        math.inf,
        Number(0, 1e6, or_inf=True),
        "largest noise level at which noise is added",
        scales="level",
    ),
    "sampling.S_noise": Key(
        1.0, Number(0, 10), "factor of that noise, 1 in theory; published values are up to 1.007"
    ),
}


@dataclass(frozen=True, kw_only=True)
class ODESampler(Sampler):
    """A sampler that integrates the method's ODE.

    Attributes:
        solver, n, schedule, rho, order, churn, rtol, atol, max_evaluations: see `solve_ode`; `n` is
            `sampling.N`.
        fit: schedule and steps fitted to a network, where schedule or solver is "fitted".
    """

    solver: str = "rk45"
    n: int = 100
    schedule: str = "auto"
    rho: float = 7.0
    order: int | None = None
    churn: Churn = Churn(0.0)
    rtol: float = 1e-4
    atol: float = 1e-4
    max_evaluations: int = 10_000
    fit: Fit | None = None

    keys = KEYS | base.KEYS | start.KEYS
    options = Sampler.options | {
        "solver": "sampling.ode_solver",
        "n": "sampling.N",
        **{
            name: f"sampling.{name}"
            for name in ("schedule", "rho", "order", "rtol", "atol", "max_evaluations")
        },
    }

    @classmethod
    def words(cls, values):
        words = f"{values.get('N')} steps"
        if values.get("schedule") == "its own":
            words = f"rtol {values.get('rtol')}, atol {values.get('atol')}"
        churn = values.get("S_churn")
        return str(values.get("ode_solver")), words, *([f"churn {churn}"] if churn else [])

    @classmethod
    def from_config(cls, config, method, codec, guide):
        churn = Churn(**{name: config.sampling[name] for name in Churn._fields})
        return replace(super().from_config(config, method, codec, guide), churn=churn)

    def check(self):
        if self.measurement is not None and RESTORERS[self.restorer] is None:
            raise ValueError(
                f"sampling.restorer={self.restorer!r} needs an SDE's sampling.method='pc'; the "
                "others take 'ode' too"
            )
        if self.measurement is not None and self.resample > 1:
            raise ValueError(
                "sampling.restore_resample above 1 needs sampling.restorer='replacement'"
            )
        if self.n < 1:
            raise ValueError(f"sampling.N must be at least 1, not {self.n}")
        if self.start and self.is_fitted:
            raise ValueError(
                "sampling.init='condition': schedule and solver 'fitted' are made for trajectories "
                "from the prior"
            )
        choose("ode_solver", self.solver, (*SOLVERS, FITTED), self.method)
        choose("schedule", self.schedule, ("auto", *SCHEDULES, FITTED), self.method)
        check_positive(self, "rho", "rtol", "atol", "max_evaluations")
        self._check_schedule()
        self._check_order()
        self._check_churn()

    def _check_schedule(self) -> None:
        if self.schedule != "auto" and solver_named(self.solver).schedule is None:
            raise ValueError(
                f"sampling.ode_solver={self.solver!r} chooses its own steps: sampling.schedule "
                f"must be 'auto', not {self.schedule!r}"
            )
        if self.solver == FITTED and self.schedule not in ("auto", FITTED):
            raise ValueError(
                "sampling.ode_solver='fitted' needs sampling.schedule='fitted' or 'auto', not "
                f"{self.schedule!r}"
            )
        if self.is_fitted and self.n > FINE_STEPS:
            raise ValueError(
                f"sampling.schedule='fitted' chooses among {FINE_STEPS} steps: sampling.N can be "
                f"no more, not {self.n}"
            )

    def _check_order(self) -> None:
        order, orders = self.order, solver_named(self.solver).orders
        if order is None:
            return
        if order not in orders:
            has = (
                f"has the orders {', '.join(map(str, orders))}" if orders else "has one order only"
            )
            raise ValueError(f"sampling.order={order}: sampling.ode_solver={self.solver!r} {has}")
        if order > self.n:
            raise ValueError(
                f"sampling.order={order} needs as many steps at least, not sampling.N={self.n}"
            )

    def _check_churn(self) -> None:
        churn = self.churn
        if churn.S_churn == 0:
            return
        must = f"sampling.S_churn must be 0, not {churn.S_churn:g}"
        if not solver_named(self.solver).churns:
            names = " and ".join(repr(name) for name, solver in SOLVERS.items() if solver.churns)
            raise ValueError(
                f"{must}: sampling.ode_solver={self.solver!r} adds no noise, only {names} do"
            )
        self.method.check_kernel("the noise of sampling.S_churn")
        if not self.method.gaussian:
            raise ValueError(
                f"{must}: {self.method.name} has no Gaussian noise that a sampler could add"
            )
        if not churn.S_min <= churn.S_max:
            raise ValueError(
                f"sampling.S_min must be at most sampling.S_max: {churn.S_min:g} and "
                f"{churn.S_max:g} are not"
            )

    @property
    def is_fitted(self) -> bool:
        return FITTED in (self.schedule, self.solver)

    @property
    def couples_samples(self) -> bool:
        return solver_named(self.solver).schedule is None

    @property
    def tells_times(self) -> bool:
        return solver_named(self.solver).schedule is None

    @property
    def integrate(self):
        if self.is_fitted and self.fit is None:
            raise ValueError(
                "sampling.schedule and sampling.ode_solver 'fitted' are made for a network, by "
                "Experiment.fitted_sampler"
            )
        schedule, advance = self.fit or (self.schedule, None)
        return partial(
            solve_ode,
            solver=self.solver,
            n=self.n,
            schedule=schedule,
            rho=self.rho,
            order=self.order,
            advance=advance,
            churn=self.churn if self.churn.S_churn else None,
            noise_removal=self.noise_removal,
            **limits_of(self),
        )

    def without_fit(self) -> Self:
        """The sampler with the schedule 'auto' and the solver 'ipndm' in place of fitted ones."""
        schedule = "auto" if self.schedule == FITTED else self.schedule
        solver = "ipndm" if self.solver == FITTED else self.solver
        return replace(self, schedule=schedule, solver=solver, fit=None)
