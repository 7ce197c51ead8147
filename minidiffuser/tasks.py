"""Tasks: a role for each modality, one rule for guidance, and the predictor they give a solver.

    role       timestep fed          data fed
    sampled    t, from T down to 0   its noisy state
    given      0                     clean data
    ignored    T                     fresh N(0, I)

**Guidance is one rule**, for any number of modalities.  For each sampled modality m, the
unconditional estimate is the same network with every *other* modality ignored:

    eps_m = (1 + s) eps_m(all in their roles) - s eps_m(others ignored)

It gives all five branches of UniDiffuser (arXiv:2303.06555, sec. 3.3), the joint one included, and
needs no extra training, because "ignored" was trained all along.  Where a call
would equal the conditional one (nothing given, one modality sampled) there is nothing to guide.
All calls of one step go through the network as one batch.
"""

import math
from collections.abc import Iterable, Mapping
from enum import Enum

import torch
from torch import Tensor, nn

from .config import Part
from .errors import choose, suggest
from .schedule import NoiseSchedule, T


class Role(str, Enum):
    """What a task does with a modality."""

    SAMPLED = "sampled"
    GIVEN = "given"
    IGNORED = "ignored"


Roles = dict[str, Role]  # modality (clock) -> role

TASKS: dict[str, dict[str, Role]] = {
    "joint": {"image": Role.SAMPLED, "text": Role.SAMPLED},
    "text-to-image": {"image": Role.SAMPLED, "text": Role.GIVEN},
    "image-to-text": {"image": Role.GIVEN, "text": Role.SAMPLED},
    "image": {"image": Role.SAMPLED, "text": Role.IGNORED},
    "text": {"image": Role.IGNORED, "text": Role.SAMPLED},
}


def roles_of(task: str) -> Roles:
    """The roles of a named task of image and text. Raises ValueError for an unknown one."""
    return dict(choose("task", task, TASKS))


def make_roles(clocks: Iterable[str], sampled: Iterable[str], given: Iterable[str] = ()) -> Roles:
    """Roles in general: what is neither sampled nor given is ignored.

    Raises:
        ValueError: an unknown modality, one both sampled and given, or nothing sampled.
    """
    clocks, sampled, given = list(clocks), set(sampled), set(given)
    for name in sampled | given:
        if name not in clocks:
            raise ValueError(f"unknown modality {name!r}.{suggest(name, clocks)}")
    if sampled & given:
        raise ValueError(f"{sorted(sampled & given)} cannot be both sampled and given")
    if not sampled:
        raise ValueError(f"nothing to sample: name at least one of {clocks}")
    role = {c: Role.SAMPLED if c in sampled else Role.GIVEN if c in given else Role.IGNORED
            for c in clocks}
    return role


def network_calls(roles: Roles, guided: bool) -> list[Roles]:
    """The calls of one solver evaluation: the conditional one, then one per guided modality.

    The unconditional call for a modality is the one in which it alone is sampled and all others are
    ignored.  It is left out where it is the conditional call itself.
    """
    calls = [roles]
    for name, role in roles.items():
        alone = {c: Role.SAMPLED if c == name else Role.IGNORED for c in roles}
        if guided and role is Role.SAMPLED and alone != roles:
            calls.append(alone)
    return calls


class NoisePredictor:
    """``predict(x, t) -> eps`` for a task: what a solver needs, and all it needs.

    The solver's state is one matrix (B, n): the sampled parts, flattened side by side in the
    network's order (:meth:`pack`, :meth:`unpack`).

    Args:
        net: a joint network, called as ``net(x, t, data_type)``.
        parts: its parts, in order.
        schedule: the noise schedule it was trained with.
        roles: modality -> role.
        given: part name -> clean data (B, *shape), for the parts of given modalities.
        guidance_scale: s of the rule above, 0 for none.  (diffusers' scale is 1 + s.)
        prediction: what the network predicts.
        generator: on the CPU, for the noise of ignored modalities.
        redraw: draw that noise anew at each call, as the official sampler does; ``False`` keeps the
            first draw, which makes the predictor a fixed function, as inverting the ODE needs.
        data_type: (B,) integers for networks with data types.

    Raises:
        ValueError: a negative scale, roles that do not fit the parts, or given data that is missing
            or of the wrong shape.
    """

    def __init__(
        self,
        net: nn.Module,
        parts: tuple[Part, ...],
        schedule: NoiseSchedule,
        roles: Roles,
        given: Mapping[str, Tensor] | None = None,
        guidance_scale: float = 0.0,
        *,
        prediction: str = "eps",
        generator: torch.Generator | None = None,
        redraw: bool = True,
        data_type: Tensor | None = None,
    ):
        if not 0 <= guidance_scale < math.inf:  # NaN is refused too
            raise ValueError("guidance_scale must be finite and at least 0 (0 is none), got "
                             f"{guidance_scale}")
        clocks = list(dict.fromkeys(p.clock for p in parts))
        roles = {clock: Role(role) for clock, role in roles.items()}
        if set(roles) != set(clocks) or Role.SAMPLED not in roles.values():
            raise ValueError(f"each of {clocks} must have a role and at least one be sampled, got "
                             f"{ {clock: role.value for clock, role in roles.items()} }")
        self.net, self.parts, self.schedule = net, parts, schedule
        self.given = dict(given or {})
        self.guidance_scale, self.prediction = guidance_scale, prediction
        self.generator, self.redraw, self.data_type = generator, redraw, data_type
        self.calls = network_calls(roles, guidance_scale > 0)
        self.sampled = [p for p in parts if roles[p.clock] is Role.SAMPLED]
        self._noise: dict[tuple[int, str], Tensor] = {}
        for p in parts:
            if roles[p.clock] is Role.GIVEN and (
                p.name not in self.given or self.given[p.name].shape[1:] != p.shape
            ):
                got = self.given.get(p.name)
                raise ValueError(f"part {p.name!r} is given, so it must be data of shape "
                                 f"(B, {', '.join(map(str, p.shape))}), got "
                                 f"{got if got is None else tuple(got.shape)}")

    # ---- the solver's state -----------------------------------------------------------------

    def pack(self, x: Mapping[str, Tensor]) -> Tensor:
        """Sampled parts, each (B, *shape) -> (B, n)."""
        return torch.cat([x[p.name].flatten(1) for p in self.sampled], dim=1)

    def unpack(self, state: Tensor) -> dict[str, Tensor]:
        """(B, n) -> part name -> (B, *shape)."""
        pieces = state.split([p.numel for p in self.sampled], dim=1)
        return {p.name: piece.unflatten(1, p.shape)
                for p, piece in zip(self.sampled, pieces, strict=True)}

    @property
    def numel(self) -> int:
        """n, the numbers in one sample's state."""
        return sum(p.numel for p in self.sampled)

    # ---- the prediction ---------------------------------------------------------------------

    def __call__(self, state: Tensor, t: Tensor) -> Tensor:
        """eps for the state (B, n) at time ``t``, a number in (0, T]; guided. Returns (B, n)."""
        t = float(t)
        x = self.unpack(state)
        batch = [self._inputs(i, roles, x, t, len(state)) for i, roles in enumerate(self.calls)]
        fed = {p.name: torch.cat([data[p.name] for data, _ in batch]) for p in self.parts}
        clocks = {c: torch.cat([time[c] for _, time in batch]) for c in batch[0][1]}
        kinds = None if self.data_type is None else self.data_type.repeat(len(self.calls))
        out = self.net(fed, clocks, kinds)

        eps = {}
        for p in self.sampled:
            per_call = out[p.name].to(state.dtype).chunk(len(self.calls))
            cond, alone = per_call[0], self._alone(p.clock)
            value = cond
            if alone is not None:
                value = cond + self.guidance_scale * (cond - per_call[alone])
            # Guidance commutes with the change of variables: both are affine, and 1 + s - s = 1.
            eps[p.name] = self.schedule.convert(value, self.prediction, "eps", x[p.name], t)
        return self.pack(eps)

    def _alone(self, clock: str) -> int | None:
        """Index of the unconditional call for a modality, if there is one."""
        for i, roles in enumerate(self.calls[1:], start=1):
            if roles[clock] is Role.SAMPLED:
                return i
        return None

    def _inputs(
        self, call: int, roles: Roles, x: dict[str, Tensor], t: float, batch: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What one call feeds the network: data by part, timesteps (B,) by clock."""
        like = next(iter(x.values()))
        time = {Role.SAMPLED: t, Role.GIVEN: 0.0, Role.IGNORED: float(T)}
        clocks = {c: like.new_full((batch,), time[role]) for c, role in roles.items()}
        data = {}
        for p in self.parts:
            if roles[p.clock] is Role.SAMPLED:
                data[p.name] = x[p.name]
            elif roles[p.clock] is Role.GIVEN:
                data[p.name] = self.given[p.name].to(like)
                if len(data[p.name]) != batch:
                    raise ValueError(f"part {p.name!r}: {len(data[p.name])} given for {batch} "
                                     "samples; give one for each")
            else:
                data[p.name] = self._ignored(call, p, like, batch)
        return data, clocks

    def _ignored(self, call: int, p: Part, like: Tensor, batch: int) -> Tensor:
        if self.redraw or (call, p.name) not in self._noise:
            noise = torch.randn((batch, *p.shape), generator=self.generator)
            self._noise[call, p.name] = noise.to(like)
        return self._noise[call, p.name]
