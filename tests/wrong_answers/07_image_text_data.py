"""Answers to the exercises of lesson 07, right in another way (RIGHT) and wrong (WRONG).

exercise -> what it is -> a whole cell, or what to replace in the reference answer.  A wrong answer
comes with a word that the message of its check must have.
"""

RIGHT = {
    "07-subset": {
        "a loop": '''
def subset(width, height, aesthetic, pwatermark, punsafe):
    keep = []
    rows = zip(*(v.tolist() for v in (width, height, aesthetic, pwatermark, punsafe)))
    for w, h, a, m, u in rows:
        keep.append(w >= 512 and h >= 512 and a >= 5 and m <= 0.5 and torch.tensor(u).item() <=
                    torch.tensor(0.1).item())
    return torch.tensor(keep)
''',
        "stacked": '''
def subset(width, height, aesthetic, pwatermark, punsafe):
    conditions = [width >= 512, height >= 512, aesthetic >= 5, pwatermark <= 0.5, punsafe <= 0.1]
    return torch.stack(conditions).all(0)
''',
        "what goes": '''
def subset(width, height, aesthetic, pwatermark, punsafe):
    rows = torch.stack([width, height, aesthetic, pwatermark, punsafe])
    bad = rows.isnan().any(0) | (width < 512) | (height < 512) | (aesthetic < 5)
    return ~(bad | (pwatermark > 0.5) | (punsafe > 0.1))
''',
    },
    "07-repeats": {
        "unique": '''
def repeats(captions):
    folded = np.array([" ".join(c.casefold().split(" ")).strip() for c in captions])
    _, inverse, counts = np.unique(folded, return_inverse=True, return_counts=True)
    return torch.from_numpy(counts[inverse])
''',
        "a dictionary": '''
def repeats(captions):
    rows = {}
    for i, c in enumerate(captions):
        rows.setdefault(c.casefold().strip(), []).append(i)
    out = torch.zeros(len(captions), dtype=torch.int64)
    for places in rows.values():
        out[places] = len(places)
    return out
''',
    },
    "07-hash": {
        "quantile": '''
def perceptual_hash(grey):
    F = torch.einsum("ky,byx,lx->bkl", C, grey, C).reshape(len(grey), 64)
    return F > torch.quantile(F, 0.5, dim=1, keepdim=True)
''',
        "lower median": '''
def perceptual_hash(grey):
    F = torch.matmul(torch.matmul(C, grey), C.t()).reshape(-1, 64)
    return F > F.median(1, keepdim=True).values
''',
        "numpy, one by one": '''
def perceptual_hash(grey):
    out = []
    for picture in grey:
        F = C.numpy() @ picture.numpy() @ C.numpy().T
        out.append(F > np.median(F))
    return torch.from_numpy(np.stack(out)).reshape(-1, 64)
''',
        "ranks": '''
def perceptual_hash(grey):
    F = (C @ grey @ C.T).reshape(len(grey), 64)
    return F.argsort(1).argsort(1) >= 32
''',
    },
    "07-candidates": {
        "all pairs": '''
def candidates(bits, pieces=4):
    found, n = set(), len(bits)
    chunks = bits.reshape(n, pieces, 64 // pieces)
    for i in range(n):
        same = (chunks[i] == chunks[i + 1:]).all(2).any(1)
        found |= {(i, i + 1 + int(j)) for j in same.nonzero()[:, 0]}
    return found
''',
        "tuples, one dictionary with the piece's number": '''
def candidates(bits, pieces=4):
    boxes, size = {}, 64 // pieces
    for i in range(len(bits)):
        for p in range(pieces):
            boxes.setdefault((p, *bits[i, p * size:(p + 1) * size].tolist()), []).append(i)
    return {(a, b) for box in boxes.values() for a in box for b in box if a < b}
''',
    },
    "07-retrieval": {
        "cosine_similarity": '''
def retrieval(f, g):
    own = torch.nn.functional.cosine_similarity(f, g)
    table = torch.nn.functional.cosine_similarity(f[:, None], g[None], dim=2)
    best = table.max(1).indices
    return own, sum(int(b) == i for i, b in enumerate(best)) / torch.tensor(float(len(f)))
''',
        "einsum": '''
def retrieval(f, g):
    f, g = (torch.nn.functional.normalize(v, dim=-1) for v in (f, g))
    table = torch.einsum("id,jd->ij", f, g)
    own = torch.einsum("id,id->i", f, g)
    return own, torch.tensor((table <= own[:, None] + 1e-6).all(1).double().mean().item())
''',
    },
}

WRONG = {
    "07-subset": {
        "nan is safe": ({"(punsafe <= 0.1)": "~(punsafe > 0.1)"}, "nobody has looked"),
        "nan becomes 0": ({"(punsafe <= 0.1)": "(punsafe.nan_to_num() <= 0.1)"},
                          "nobody has looked"),
        "nan is beautiful": ({"(aesthetic >= 5)": "~(aesthetic < 5)"}, "aesthetic score"),
        "the longer side": ({"torch.minimum": "torch.maximum"}, "both sides count"),
        "the area": ({"torch.minimum(width, height) >= 512": "width * height >= 512 * 512"},
                     "both sides count"),
        "the width alone": ({"torch.minimum(width, height)": "width"}, "both sides count"),
        "above, not at": ({">= 512": "> 512"}, "exactly at the limits"),
        "below, not at": ({"punsafe <= 0.1": "punsafe < 0.1"}, "exactly at the limits"),
        "punsafe at 0.5": ({"punsafe <= 0.1": "punsafe <= 0.5"}, "limit is 0.1"),
        "no watermark filter": ({" & (pwatermark <= 0.5)": ""}, "watermark"),
        "no aesthetic filter": ({" & (aesthetic >= 5)": ""}, "aesthetic"),
        "safe is unsafe": ({"punsafe <= 0.1": "punsafe >= 0.1"}, "limit is 0.1"),
        "numbers of rows": ({"return big": "return torch.nonzero(big",
                             "(punsafe <= 0.1)": "(punsafe <= 0.1))"}, "bool tensor"),
        "no return": ({"return big": "big"}, "return missing"),
    },
    "07-repeats": {
        "case counts": ({".strip().casefold()": ".strip()"}, "Case counts"),
        "neither case nor space": ({".strip().casefold()": ""}, "Case and space count"),
        "space counts": ({".strip().casefold()": ".casefold()"}, "Space around"),
        "lower": ({".casefold()": ".lower()"}, "casefold() does not"),
        "without itself": ({"[count[caption] for": "[count[caption] - 1 for"}, "counts itself"),
        "running": ('''
def repeats(captions):
    seen, out = Counter(), []
    for caption in captions:
        seen[caption.strip().casefold()] += 1
        out.append(seen[caption.strip().casefold()])
    return torch.tensor(out)
''', "running counts"),
        "whether": ({"[count[caption] for": "[int(count[caption] > 1) for"}, "how often is asked"),
        "one for each caption": ({"for caption in folded])": "for caption in count])"}, "shape"),
        "all space goes": ({".strip().casefold()": '.replace(" ", "").casefold()'},
                           "within a caption"),
        "in place": ({"folded = [caption.strip().casefold() for caption in captions]":
                          "captions[:] = [c.strip().casefold() for c in captions]\n"
                          "    folded = captions"}, "work on a copy"),
        "a list": ({"return torch.tensor([count[caption] for caption in folded])":
                        "return [count[caption] for caption in folded]"}, "should be a tensor"),
    },
    "07-hash": {
        "mean": ({"waves > median": "waves > waves.mean(1, keepdim=True)"}, "with the mean"),
        "zero": ({"return waves > median": "return waves > 0"}, "compared with 0"),
        "upside down": ({"waves > median": "waves < median"}, "upside down"),
        "transposed": ({"C @ grey @ C.T": "(C @ grey @ C.T).mT"}, "swapped"),
        "median of the batch": ({"waves > median": "waves > waves.flatten().quantile(0.5)"},
                                "each picture has its own"),
        "pixels": ({"(C @ grey @ C.T)": "grey[:, :8, :8]"}, "not their waves"),
        "only one side": ({"(C @ grey @ C.T)": "(C @ grey)[:, :, :8]"}, "should be"),
        "not flat": ({"return waves > median": "return (waves > median).view(-1, 8, 8)"}, "shape"),
        "numbers": ({"waves > median": "(waves > median).float()"}, "bool tensor"),
        "no return": ({"return waves > median": "waves > median"}, "return missing"),
    },
    "07-candidates": {
        "all pieces equal": ('''
def candidates(bits, pieces=4):
    n = len(bits)
    return {(i, j) for j in range(n) for i in range(j) if bool((bits[i] == bits[j]).all())}
''', "they are missing"),
        "the first piece only": ({"bits.chunk(pieces, dim=1)": "bits.chunk(pieces, dim=1)[:1]"},
                                 "they are missing"),
        "both ways": ({"found.update((i, j) for": "found.update(pair for",
                       "boxes.get(key, []))": "boxes.get(key, []) for pair in ((i, j), (j, i)))"},
                      "i < j"),
        "with itself": ('''
def candidates(bits, pieces=4):
    found = set()
    for piece in bits.chunk(pieces, dim=1):
        boxes = {}
        for j, key in enumerate(map(bytes, piece.numpy())):
            boxes.setdefault(key, []).append(j)
            found.update((i, j) for i in boxes[key])
    return found
''', "i < j"),
        "one dictionary": ({"    for piece in bits": "    boxes = {}\n    for piece in bits",
                            "        boxes = {}\n        for j": "        for j",
                            "for i in boxes.get(key, []))":
                                "for i in boxes.get(key, []) if i < j)"}, "mixed"),
        "only neighbours in a box": ({"found.update((i, j) for i in boxes.get(key, []))":
                                          "found.update((i, j) for i in boxes.get(key, [])[-1:])"},
                                     "missing"),
        "4 pieces whatever is asked": ({"bits.chunk(pieces, dim=1)": "bits.chunk(4, dim=1)"},
                                       "with 2 pieces"),
        "hashes that are near": ('''
def candidates(bits, pieces=4):
    n = len(bits)
    return {(i, j) for j in range(n) for i in range(j) if int((bits[i] != bits[j]).sum()) <= pieces}
''', "a whole one"),
        "no return": ({"return found": "found"}, "return missing"),
    },
    "07-retrieval": {
        "scalar product": ({"    f = f / f.norm(dim=1, keepdim=True)\n": "",
                            "    g = g / g.norm(dim=1, keepdim=True)\n": ""}, "scalar products"),
        "pictures only": ({"    g = g / g.norm(dim=1, keepdim=True)\n": ""}, "Only the pictures"),
        "texts only": ({"    f = f / f.norm(dim=1, keepdim=True)\n": ""}, "Only the texts"),
        "columns": ({"dim=1, keepdim=True": "dim=0, keepdim=True"}, "each row is a vector"),
        "texts choose": ({"table.argmax(1)": "table.argmax(0)"}, "find their picture"),
        "a number": ({".float().mean()": ".float().sum()"}, "divide by N"),
        "the mean cosine": ({"(table.argmax(1) == torch.arange(len(f))).float().mean()":
                                 "table.diagonal().mean()"}, "mean cosine"),
        "the whole table": ({"return table.diagonal()": "return table"}, "shape"),
        "one thing": ({", (table.argmax(1) == torch.arange(len(f))).float().mean()": ""},
                      "two things"),
        "in place": ({"f = f / f.norm(dim=1, keepdim=True)": "f = f / f.norm()"}, "should be"),
    },
}
