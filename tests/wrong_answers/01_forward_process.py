"""Answers to the exercises of lesson 01, right in another way (RIGHT) and wrong (WRONG).

exercise -> what it is -> a whole cell, or what to replace in the reference answer.  A wrong answer
comes with a word that the message of its check must have.
"""

RIGHT = {
    "01-alpha-bar": {
        "a loop": '''
def alpha_bar_of(betas):
    out = [torch.tensor(1.0, dtype=betas.dtype)]
    for beta in betas:
        out.append(out[-1] * (1 - beta))
    return torch.stack(out)
''',
        "in logarithms, in place": '''
def alpha_bar_of(betas):
    out = torch.ones(len(betas) + 1, dtype=betas.dtype)
    out[1:] = torch.log1p(-betas).cumsum(0).exp()
    return out
''',
    },
    "01-perturb": {
        "a loop over images": '''
def perturb(x0, t, noise, alpha_bar):
    return torch.stack([alpha_bar[i].sqrt() * x + (1 - alpha_bar[i]).sqrt() * n
                        for x, i, n in zip(x0, t, noise)]).to(x0.dtype)
''',
        "einsum": '''
def perturb(x0, t, noise, alpha_bar):
    a = alpha_bar[t].to(x0.dtype)
    return torch.einsum("b,b...->b...", a**0.5, x0) + torch.einsum("b,b...->b...", (1 - a) ** 0.5,
                                                                  noise)
''',
        "moved axes, in place": '''
def perturb(x0, t, noise, alpha_bar):
    out = (x0.movedim(0, -1) * alpha_bar[t].sqrt().to(x0)).movedim(-1, 0).clone()
    out += (noise.movedim(0, -1) * (1 - alpha_bar[t]).sqrt().to(x0)).movedim(-1, 0)
    return out
''',
    },
    "01-log-snr": {
        "of the ratio": {"alpha_bar.log() - (1 - alpha_bar).log()":
                             "torch.log(alpha_bar / (1 - alpha_bar))",
                         "torch.sigmoid(log_snr)": "1 / (1 + torch.exp(-log_snr))"},
        "by name": {"alpha_bar.log() - (1 - alpha_bar).log()": "torch.logit(alpha_bar)",
                    "torch.sigmoid(log_snr)": "0.5 * (1 + torch.tanh(log_snr / 2))"},
    },
    "01-same-snr": {
        "a loop": '''
def same_snr(t, bar, other):
    best, nearest = None, float("inf")
    for s in range(1, len(other)):
        distance = abs(float(log_snr(bar[t]) - log_snr(other[s])))
        if distance < nearest:
            best, nearest = s, distance
    return best
''',
        "a full list": {"log_snr(other[1:]) ": "torch.logit(other) ",
                        ".abs().argmin()) + 1": ".abs().argmin())"},
    },
    "01-measure": {
        "einsum": '''
def measured_log_snr(x_t, x0):
    a, b = x_t.flatten(), x0.flatten()
    alpha = torch.einsum("i,i->", a, b) / torch.einsum("i,i->", b, b)
    rest = a - alpha * b
    return torch.log(alpha.square()) - torch.log(rest.dot(rest) / len(rest))
''',
        "least squares": '''
def measured_log_snr(x_t, x0):
    alpha = torch.linalg.lstsq(x0.reshape(-1, 1), x_t.reshape(-1, 1)).solution.squeeze()
    return 2 * alpha.log() - (x_t - alpha * x0).var(correction=0).log()
''',
    },
}

WRONG = {
    "01-alpha-bar": {
        "product of betas": ({"1 - betas": "betas"}, "product of betas"),
        "no cumprod": ({"(1 - betas).cumprod(0)": "(1 - betas)"}, "multiply them up"),
        "sum": ({"(1 - betas).cumprod(0)": "(1 - betas.cumsum(0))"}, "That is a sum"),
        "root": ({"(1 - betas).cumprod(0)])": "(1 - betas).cumprod(0)]).sqrt()"}, "square root"),
        "no 1 in front": ({"torch.cat([betas.new_ones(1), (1 - betas).cumprod(0)])":
                               "(1 - betas).cumprod(0)"}, "t = 0 is missing"),
        "1 at the end": ({"[betas.new_ones(1), (1 - betas).cumprod(0)]":
                              "[(1 - betas).cumprod(0), betas.new_ones(1)]"}, "belongs in front"),
        "in place on the input": ({"return torch.cat([betas.new_ones(1), (1 - betas).cumprod(0)])":
                                       "return torch.cat([betas.new_ones(1), betas.neg_().add_(1)"
                                       ".cumprod(0)])"}, "work on a copy"),
        "no return": ({"return torch": "torch"}, "return missing"),
    },
    "01-perturb": {
        "no roots": ({"a.sqrt()": "a", "(1 - a).sqrt()": "(1 - a)"}, "square root"),
        "no root of the noise": ({"(1 - a).sqrt()": "(1 - a)"}, "the root is missing"),
        "no root of the picture": ({"a.sqrt() * x0": "a * x0"}, "the root is missing"),
        "1 minus the root": ({"(1 - a).sqrt()": "(1 - a.sqrt())"}, "1 minus the root"),
        "swapped": ({"a.sqrt() * x0 + (1 - a).sqrt() * noise":
                         "(1 - a).sqrt() * x0 + a.sqrt() * noise"}, "swapped"),
        "wrong axis": ({".reshape(-1, *[1] * (x0.ndim - 1))": ""}, "lines up with the columns"),
        "picture not scaled": ({"a.sqrt() * x0": "x0"}, "not scaled"),
        "images only": ({"*[1] * (x0.ndim - 1)": "1, 1, 1"}, "shape"),
        "t - 1": ({"alpha_bar[t]": "alpha_bar[(t - 1).clamp(min=0)]"}, "should be"),
        "noise of its own": ({"* noise": "* torch.randn_like(x0)"}, "should be"),
    },
    "01-log-snr": {
        "no logarithm": ({"alpha_bar.log() - (1 - alpha_bar).log()": "alpha_bar / (1 - alpha_bar)"},
                         "take its logarithm"),
        "upside down": ({"alpha_bar.log() - (1 - alpha_bar).log()":
                             "(1 - alpha_bar).log() - alpha_bar.log()"}, "upside down"),
        "half": ({"return alpha_bar.log() - (1 - alpha_bar).log()":
                      "return (alpha_bar.log() - (1 - alpha_bar).log()) / 2"}, "half of it"),
        "signal alone": ({" - (1 - alpha_bar).log()": ""}, "divide by the noise"),
        "base 10": ({".log()": ".log10()"}, "natural"),
        "back: sign": ({"sigmoid(log_snr)": "sigmoid(-log_snr)"}, "sign of the exponent"),
        "back: ratio": ({"torch.sigmoid(log_snr)": "log_snr.exp()"}, "SNR / (1 + SNR)"),
        "back: exp over 1 + exp": ({"torch.sigmoid(log_snr)":
                                        "log_snr.exp() / (1 + log_snr.exp())"}, "nan"),
    },
    "01-same-snr": {
        "index off by one": ({".argmin()) + 1": ".argmin())"}, "one too low"),
        "swapped": ({"other[1:]": "bar[1:]", "bar[t]": "other[t]"}, "swapped"),
        "t itself": ({"int((inner - log_snr(bar[t])).abs().argmin()) + 1": "t"},
                     "schedules differ"),
        "distance not absolute": ({".abs()": ""}, "should be"),
        "distance of alpha-bar": ({"log_snr(other[1:])": "other[1:]", "log_snr(bar[t])": "bar[t]"},
                                  "is the distance that of log-SNR"),
        "no return": ({"return int": "int"}, "return missing"),
    },
    "01-measure": {
        "no logarithm": ({".mean()).log()": ".mean())"}, "take its logarithm"),
        "half": ({"(alpha**2 / (x_t - alpha * x0).square().mean()).log()":
                      "(alpha / (x_t - alpha * x0).square().mean().sqrt()).log()"}, "half of it"),
        "upside down": ({"return (": "return -("}, "upside down"),
        "alpha not squared": ({"alpha**2": "alpha"}, "alpha is to be squared"),
        "picture left in": ({"(x_t - alpha * x0)": "x_t"}, "taken out of x_t"),
        "mean of products": ({"(x0 * x0).sum()": "x0.numel()"}, "variance 9"),
        "no return": ({"return (": "("}, "return missing"),
    },
}
