"""Answers to the exercises of lesson 03, right in another way (RIGHT) and wrong (WRONG).

exercise -> what it is -> a whole cell, or what to replace in the reference answer.  A wrong answer
comes with a word that the message of its check must have.
"""

RIGHT = {
    "03-ddim-step": {
        "by y and k": '''
def ddim_step(x, eps_hat, t, s, schedule):
    k_t, k_s = schedule.sigma(t) / schedule.alpha(t), schedule.sigma(s) / schedule.alpha(s)
    return schedule.alpha(s) * (x / schedule.alpha(t) + (k_s - k_t) * eps_hat)
''',
        "by convert and perturb": '''
def ddim_step(x, eps_hat, t, s, schedule):
    return schedule.perturb(schedule.convert(eps_hat, "eps", "x0", x, t), s, eps_hat)
''',
        "a loop, in place": '''
def ddim_step(x, eps_hat, t, s, schedule):
    out = torch.empty_like(x)
    for i in range(len(x)):
        out[i] = (x[i] - schedule.sigma(t) * eps_hat[i]) / schedule.alpha(t)
        out[i] *= schedule.alpha(s)
        out[i] += schedule.sigma(s) * eps_hat[i]
    return out
''',
    },
    "03-order": {
        "numpy": '''
import numpy as np


def order(steps, errors):
    return -np.polyfit(np.log(np.asarray(steps)), np.log(np.asarray(errors)), 1)[0]
''',
        "in float32": {".double()": ""},
        "normal equations, base 2": '''
def order(steps, errors):
    x, y = [torch.log2(torch.as_tensor(v, dtype=torch.float64)) for v in (steps, errors)]
    a = torch.stack([x, torch.ones_like(x)], 1)
    return -torch.linalg.lstsq(a, y[:, None]).solution[0].item()
''',
    },
    "03-exponential-step": {
        "expm1": {"schedule.alpha(s) * (1 - torch.exp(-h)) * d":
                      "schedule.alpha(s) * -torch.expm1(-h) * d"},
        "no lambda": '''
def exponential_step(x, d, t, s, schedule):
    shrink = schedule.sigma(s) / schedule.sigma(t)
    return shrink * x + (schedule.alpha(s) - shrink * schedule.alpha(t)) * d
''',
        "by powers of e": '''
def exponential_step(x, d, t, s, schedule):
    e = [schedule.lambda_(u).exp() for u in (t, s)]
    return schedule.sigma(s) * (x / schedule.sigma(t) + (e[1] - e[0]) * d)
''',
    },
    "03-extrapolate": {
        "by a slope": '''
def extrapolate(d_now, d_before, lam_before, lam_now, lam_next):
    slope = (d_now - d_before) / (lam_now - lam_before)
    return d_now + slope * (lam_next - lam_now) / 2
''',
        "by two weights": '''
def extrapolate(d_now, d_before, lam_before, lam_now, lam_next):
    w = (lam_next - lam_now) / (2 * (lam_now - lam_before))
    return (1 + w) * d_now - w * d_before
''',
    },
    "03-grid": {
        "a loop": '''
def logsnr_grid(schedule, steps, start=1000.0, end=1.0):
    first, last = [schedule.lambda_(torch.tensor(u, dtype=torch.float64)) for u in (start, end)]
    return [schedule.inverse_lambda(first + (last - first) * i / steps).item()
            for i in range(steps + 1)]
''',
        "a tensor, from the other end": {
            "torch.linspace(ends[0], ends[1], steps + 1, dtype=torch.float64)":
                "torch.linspace(ends[1], ends[0], steps + 1, dtype=torch.float64).flip(0)",
            ".tolist()": ""},
    },
}

WRONG = {
    "03-ddim-step": {
        "not divided by alpha": ({" / schedule.alpha(t)": ""}, "divided by alpha_t"),
        "sigma of t": ({"schedule.sigma(s) * eps": "schedule.sigma(t) * eps"}, "that of time s"),
        "alpha_s forgotten": ({"schedule.alpha(s) * x0": "x0"}, "alpha_s is missing"),
        "alpha_bar": ({"schedule.alpha(": "schedule.alpha_bar("}, "alpha_bar"),
        "minus for plus": ({"x0_hat + schedule": "x0_hat - schedule"}, "wrong sign"),
        "clean guess": ({"return schedule.alpha(s) * x0_hat + schedule.sigma(s) * eps_hat":
                             "return x0_hat"}, "noise it again"),
        "t and s swapped": ({"(t)": "(u)", "(s)": "(t)", "(u)": "(s)"}, "swapped"),
        "fresh noise": ({"schedule.sigma(s) * eps_hat": "schedule.sigma(s) * torch.randn(x.shape)"},
                        "should be"),
        "the package's": ('''
def ddim_step(x, eps_hat, t, s, schedule):
    return solvers.last(solvers.ddim(lambda x, t: eps_hat, x, schedule, [float(t), float(s)]))
''', "Write it yourself"),
    },
    "03-order": {
        "negative": ({"return -": "return "}, "turn the sign round"),
        "no logs": ({".double().log()": ".double()"}, "log on both axes"),
        "log of the errors alone": ({"torch.as_tensor(steps).double().log()":
                                         "torch.as_tensor(steps).double()"}, "log on both axes"),
        "different bases": ({"torch.as_tensor(steps).double().log()":
                                 "torch.as_tensor(steps).double().log10()"}, "same base"),
        "axes swapped": ({"(x * x).sum()": "(y * y).sum()", "(x * y).sum() / (y * y).sum()":
                              "(y * y).sum() / (x * y).sum()", "return -(": "return -1 / ("},
                         "swap the axes"),
        "ends only": ({"return -((x * y).sum() / (x * x).sum()).item()":
                           "return -((y[-1] - y[0]) / (x[-1] - x[0])).item()"}, "use all points"),
        "mean not taken off": ({"x, y = x - x.mean(), y - y.mean()": "pass"}, "should be 1.5"),
    },
    "03-exponential-step": {
        "sign of h": ({"schedule.lambda_(s) - schedule.lambda_(t)":
                           "schedule.lambda_(t) - schedule.lambda_(s)"}, "wrong sign"),
        "bracket negative": ({"1 - torch.exp(-h)": "torch.exp(-h) - 1"}, "its negative"),
        "ratio upside down": ({"schedule.sigma(s) / schedule.sigma(t)":
                                   "schedule.sigma(t) / schedule.sigma(s)"}, "upside down"),
        "alpha of t": ({"schedule.alpha(s)": "schedule.alpha(t)"}, "not alpha_t"),
        "whole log-SNR": ({"-h)": "-2 * h)"}, "twice too long"),
        "alpha forgotten": ({"schedule.alpha(s) * (1": "(1"}, "shrunk by alpha_s"),
        "ratio of alphas": ({"schedule.sigma(s) / schedule.sigma(t)":
                                 "schedule.alpha(s) / schedule.alpha(t)"}, "not of alphas"),
        "the package's": ('''
def exponential_step(x, d, t, s, schedule):
    eps = schedule.convert(d, "x0", "eps", x, t)
    return solvers.last(solvers.ddim(lambda x, t: eps, x, schedule, [float(t), float(s)]))
''', "Write it yourself"),
    },
    "03-extrapolate": {
        "r upside down": ({"(lam_now - lam_before) / (lam_next - lam_now)":
                               "(lam_next - lam_now) / (lam_now - lam_before)"}, "upside down"),
        "no half": ({"(2 * r)": "r"}, "half is missing"),
        "minus for plus": ({"d_now + ": "d_now - "}, "sign is wrong"),
        "from the guess before": ({"d_now + (": "d_before + ("}, "from the guess now"),
        "equal widths": ({"(2 * r)": "2"}, "widths matter"),
        "a mean": ({"d_now + (d_now - d_before) / (2 * r)": "(d_now + d_before) / 2"},
                   "look ahead"),
        "precedence": ({"/ (2 * r)": "/ 2 * r"}, "upside down"),
    },
    "03-grid": {
        "one too few": ({"steps + 1": "steps"}, "10 steps have 11 times"),
        "lambdas": ({"schedule.inverse_lambda(lambdas)": "lambdas"}, "inverse_lambda"),
        "rising": ({"ends[0], ends[1]": "ends[1], ends[0]"}, "should fall"),
        "even in t": ({"schedule.lambda_(torch.tensor([start, end], dtype=torch.float64))":
                           "[start, end]", "schedule.inverse_lambda(lambdas)": "lambdas"},
                      "even in t"),
        "even in SNR": ({"schedule.lambda_(torch": "schedule.snr(torch",
                         "inverse_lambda(lambdas)": "inverse_lambda(0.5 * lambdas.log())"},
                        "should be equal"),
        "stops at 2": ({"[start, end]": "[start, 2.0]"}, "from 1000 to 1"),
        "the package's": ('''
def logsnr_grid(schedule, steps, start=1000.0, end=1.0):
    return solvers.time_grid(schedule, steps, "logsnr", start, end)
''', "Write it yourself"),
    },
}
