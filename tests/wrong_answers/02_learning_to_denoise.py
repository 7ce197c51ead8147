"""Answers to the exercises of lesson 02, right in another way (RIGHT) and wrong (WRONG).

exercise -> what it is -> a whole cell, or what to replace in the reference answer.  A wrong answer
comes with a word that the message of its check must have.
"""

RIGHT = {
    "02-posterior-mean": {
        "loop over points": '''
def posterior_mean(x, data, alpha, sigma):
    out = []
    for point in x:
        log = torch.stack([-((point - alpha * d) ** 2).sum() / 2 / sigma**2 for d in data])
        out.append(sum(w * d for w, d in zip((log - log.logsumexp(0)).exp(), data)))
    return torch.stack(out)
''',
        "cdist and einsum": '''
def posterior_mean(x, data, alpha, sigma):
    logits = -0.5 * (torch.cdist(x, alpha * data) / sigma) ** 2
    return torch.einsum("bn,nd->bd", logits.softmax(-1), data)
''',
        "exp after subtracting the largest": '''
def posterior_mean(x, data, alpha, sigma):
    log = -((x[:, None, :] - alpha * data[None]) ** 2).sum(2) / (2 * sigma**2)
    w = (log - log.max(1, keepdim=True).values).exp()
    return (w[:, :, None] * data).sum(1) / w.sum(1, keepdim=True)
''',
    },
    "02-posterior": {
        "by precisions": '''
def posterior(x_t, x0, t, s, schedule):
    a_t, a_s, s_t, s_s = (schedule.alpha(t), schedule.alpha(s), schedule.sigma(t),
                          schedule.sigma(s))
    b2 = s_t**2 - (a_t / a_s) ** 2 * s_s**2
    v = b2 * s_s**2 / s_t**2
    weight_x0 = a_s * b2 / s_t**2
    return weight_x0 * x0 + (a_t / a_s) * s_s**2 / s_t**2 * x_t, torch.sqrt(v)
''',
        "as DDIM writes it": '''
def posterior(x_t, x0, t, s, schedule):
    eps = (x_t - schedule.alpha(t) * x0) / schedule.sigma(t)
    v = (schedule.sigma(s) / schedule.sigma(t)) ** 2 * (
        1 - schedule.alpha_bar(t) / schedule.alpha_bar(s))
    return schedule.alpha(s) * x0 + (schedule.sigma(s) ** 2 - v).clamp(min=0).sqrt() * eps, v**0.5
''',
    },
    "02-eps-loss": {
        "mse_loss and rand": '''
def eps_loss(net, x0, schedule, generator):
    t = (torch.rand(len(x0), generator=generator) * 1000).floor() + 1
    noise = torch.randn(*x0.shape, generator=generator)
    x_t = schedule.perturb(x0, t, noise)
    return torch.nn.functional.mse_loss(net(x_t, t), noise)
''',
        "perturb by hand": '''
def eps_loss(net, x0, schedule, generator):
    noise = torch.randn(x0.shape, generator=generator)
    t = torch.randint(1, 1001, (x0.shape[0],), generator=generator).to(torch.float32)
    x_t = schedule.alpha(t)[:, None] * x0 + schedule.sigma(t)[:, None] * noise
    error = net(x_t, t) - noise
    return (error * error).sum() / error.numel()
''',
    },
    "02-denoiser": {
        "other order": {"[self.features(x), angles.sin(), angles.cos()]":
                            "[torch.cos(angles), self.features(x), torch.sin(angles)]"},
        "outer product": {"t[:, None] / T * self.times":
                              'torch.einsum("b,k->bk", t / T, self.times)'},
        "a loop": {"angles = t[:, None] / T * self.times": "u = t / T",
                   "angles.sin(), angles.cos()":
                       "*[f(u * w)[:, None] for w in self.times for f in (torch.sin, torch.cos)]"},
    },
    "02-ancestral-step": {
        "in place": '''
def ancestral_step(x, eps_hat, t, s, schedule, generator):
    x0_hat = schedule.convert(eps_hat, "eps", "x0", x, t)
    out, std = posterior(x, x0_hat, t, s, schedule)
    out += torch.randn(x.shape, generator=generator) * std
    return out
''',
        "without posterior": '''
def ancestral_step(x, eps_hat, t, s, schedule, generator):
    x0 = (x - schedule.sigma(t) * eps_hat) / schedule.alpha(t)
    v = (schedule.sigma(s) / schedule.sigma(t)) ** 2 * (
        1 - (schedule.alpha(t) / schedule.alpha(s)) ** 2)
    direction = (schedule.sigma(s) ** 2 - v).clamp(min=0).sqrt()
    z = torch.randn(x.shape, generator=generator)
    return schedule.alpha(s) * x0 + direction * eps_hat + v.sqrt() * z
''',
    },
    "02-waves": {
        "einsum": '''
def waves(x, frequencies):
    angles = torch.einsum("bd,k->bdk", x, frequencies).reshape(len(x), -1)
    return torch.hstack([torch.sin(angles), torch.cos(angles)])
''',
        "loops": '''
def waves(x, frequencies):
    columns = [f(x[:, d] * w) for f in (torch.sin, torch.cos)
               for d in range(x.shape[1]) for w in frequencies]
    return torch.stack(columns, dim=1)
''',
    },
}

WRONG = {
    "02-posterior-mean": {
        "data not scaled": ({"alpha * data": "data"}, "shrink by alpha"),
        "2 missing": ({"(2 * sigma**2)": "sigma**2"}, "the 2 is missing"),
        "sigma for sigma squared": ({"2 * sigma**2": "2 * sigma"}, "the variance"),
        "softmax over the batch": ({"dim=1": "dim=0"}, "wrong axis"),
        "nearest point": ({"weights @ data": "data[squared.argmin(1)]"}, "nearest point"),
        "alpha times the mean": ({"weights @ data": "alpha * (weights @ data)"}, "alpha times"),
        "exp without a softmax's care": (
            {"torch.softmax(-squared / (2 * sigma**2), dim=1)":
                 "torch.exp(-squared / (2 * sigma**2)); weights /= weights.sum(1, keepdim=True)"},
            "nan"),
        "not squared": ({".square().sum(-1)": ".square().sum(-1).sqrt()"}, "should be"),
        "no return": ({"return weights": "weights"}, "return missing"),
    },
    "02-posterior": {
        "variance for std": ({"sigma_s * b2.sqrt() / sigma_t": "sigma_s**2 * b2 / sigma_t**2"},
                             "square root"),
        "b for std": ({"sigma_s * b2.sqrt() / sigma_t": "b2.sqrt()"}, "makes it smaller"),
        "sigma_s for std": ({"sigma_s * b2.sqrt() / sigma_t": "sigma_s"}, "forgets"),
        "swapped": ({"alpha_s * x0 + a * sigma_s**2 * x_t": "alpha_s * x_t + a * sigma_s**2 * x0"},
                    "swapped"),
        "x0 not scaled": ({"alpha_s * x0": "x0"}, "alpha_s x_0"),
        "mean alone": ({", sigma_s * b2.sqrt() / sigma_t": ""}, "two things"),
        "a squared forgotten": ({"a**2 * sigma_s**2": "a * sigma_s**2"}, "should be"),
        "sigma_t not squared": ({"/ sigma_t**2": "/ sigma_t"}, "should be"),
        "alpha_bar for alpha": ({"alpha_t / alpha_s": "(alpha_t / alpha_s) ** 2"}, "should be"),
    },
    "02-eps-loss": {
        "one t for all": ({"(len(x0),)": "(1,)", ".float()": ".float().expand(len(x0))"},
                          "share one timestep"),
        "rand for randn": ({"torch.randn": "torch.rand"}, "randn, not rand"),
        "target is x0": ({"- noise)": "- x0)"}, "is that noise the target"),
        "fresh noise as the target": ({"- noise)": "- torch.randn(x0.shape, generator=generator))"},
                                      "is that noise the target"),
        "sum over coordinates": ({".square().mean()": ".square().sum(1).mean()"}, "sum over"),
        "sum": ({".square().mean()": ".square().sum()"}, "sum over the batch"),
        "absolute error": ({".square().mean()": ".abs().mean()"}, "absolute"),
        "root": ({".square().mean()": ".square().mean().sqrt()"}, "root"),
        "t from 0": ({"randint(1, T + 1": "randint(0, T + 1"}, "start at 1"),
        "half of the times": ({"T + 1": "T // 2"}, "noisy end"),
        "whole numbers": ({".float()": ""}, "float"),
        "alpha_bar for alpha": ({"schedule.perturb(x0, t, noise)":
                                     "schedule.alpha_bar(t)[:, None] * x0 + noise * "
                                     "(1 - schedule.alpha_bar(t)[:, None])"}, "alpha x_0"),
        "one noise for both coordinates": ({"torch.randn(x0.shape, generator=generator)":
                                                "torch.randn(len(x0), 1, generator=generator)"
                                                ".expand(x0.shape)"}, "every coordinate"),
        "one noise for all points": ({"torch.randn(x0.shape, generator=generator)":
                                          "torch.randn(1, 2, generator=generator)"
                                          ".expand(x0.shape)"}, "every point"),
        "global generator": ({"torch.randn(x0.shape, generator=generator)":
                                  "torch.randn(x0.shape)"}, "same generator"),
        "detached": ({"net(schedule.perturb(x0, t, noise), t)":
                          "net(schedule.perturb(x0, t, noise), t).detach()",
                      ").square().mean()": ").square().mean().requires_grad_()"}, "gradient"),
    },
    "02-denoiser": {
        "raw t": ({"/ T ": ""}, "divide t by T"),
        "sines only": ({"angles.cos()": "angles.sin()"}, "sines only"),
        "t forgotten": ({"angles.sin(), angles.cos()": "angles * 0, angles * 0 + 1"},
                        "depend on t"),
        "one t for all": ({"t[:, None]": "t.mean() * torch.ones(len(x), 1)"}, "another's t"),
        "no features": ({"self.features(x), angles.sin()": "angles[:, :2], angles.sin()"},
                        "coordinates of x"),
        "no return": ({"return self": "self"}, "return missing"),
        "one frequency": ({"self.times  ": "self.times[:1].expand(6)  "}, "sine or cosine"),
        "t shifted": ({"t[:, None]": "(t[:, None] - 1)"}, "cosine"),
        "times of another point": ({"t[:, None]": "t.flip(0)[:, None]"}, "another's t"),
    },
    "02-ancestral-step": {
        "no noise": ({"mean + std * torch.randn(x.shape, generator=generator)": "mean"},
                     "fresh noise is missing"),
        "variance for std": ({"std * torch": "std**2 * torch"}, "variance"),
        "sigma_s for std": ({"std * torch": "schedule.sigma(s) * torch"}, "sigma_s"),
        "not divided by alpha": ({" / schedule.alpha(t)": ""}, "divided by alpha_t"),
        "sigma forgotten": ({"schedule.sigma(t) * eps_hat": "eps_hat"}, "factor is missing"),
        "eps for x0": ({"posterior(x, x0_hat": "posterior(x, eps_hat"}, "work out x0_hat"),
        "rand for randn": ({"torch.randn": "torch.rand"}, "should be"),
        "plus for minus": ({"x - schedule": "x + schedule"}, "should be"),
        "the package's": ('''
def ancestral_step(x, eps_hat, t, s, schedule, generator):
    return solvers.last(solvers.ddpm(lambda x, t: eps_hat, x, schedule, [float(t), float(s)],
                                     generator=generator))
''', "Write it yourself"),
    },
    "02-waves": {
        "cosines first": ({"angles.sin(), angles.cos()": "angles.cos(), angles.sin()"}, "swapped"),
        "sines twice": ({"angles.cos()": "angles.sin()"}, "Sines alone"),
        "divided": ({"* frequencies": "/ frequencies"}, "you divide"),
        "2 pi": ({"* frequencies": "* frequencies * math.tau"}, "2 pi"),
        "frequencies first": ({"(x[:, :, None] * frequencies)":
                                   "(x[:, None, :] * frequencies[:, None])"}, "order differs"),
        "alternating": ({"torch.cat([angles.sin(), angles.cos()], 1)":
                             "torch.stack([angles.sin(), angles.cos()], 2).flatten(1)"},
                        "alternate"),
        "sines only": ({"torch.cat([angles.sin(), angles.cos()], 1)": "angles.sin()"}, "shape"),
        "coordinates summed": ({"x[:, :, None]": "x.sum(1)[:, None, None]"}, "shape"),
    },
}
