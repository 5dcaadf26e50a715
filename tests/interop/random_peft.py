"""Random configs of PEFT for the modules of a timm model. Everything follows from a seed."""

import os
import random
import re

#: Set by `make test-peft-random`.
LONG = os.environ.get("TFIMM_LORA_LONG_PEFT_TESTS") == "1"


def cases(short, long):
    """The seeds of the short comparison, or of the long one."""
    return range(long if LONG else short)


class RandomConfigs:
    """Draws fields of PEFT's LoraConfig that fit a model, nearly fit it, or do not.

    Args:
        seed: The seed.
        modules: The names of all modules of the timm model, and whether PEFT supports each.
    """

    def __init__(self, seed, modules):
        self.random = random.Random(seed)
        self.modules = list(modules)
        self.adaptable = [name for name, supported in modules.items() if supported]
        self.levels = sorted(
            {
                level
                for name in self.modules
                for level in re.findall(r"(?:^|\.)([^.]+)(?=\.\d+\.)", name)
            }
        )

    def chance(self, probability):
        return self.random.random() < probability

    def end_of(self, name):
        """The end of a name, of one level or more."""
        levels = name.split(".")
        return ".".join(levels[self.random.randrange(len(levels)) :])

    def name(self):
        """A module that can be adapted, an end of its name, or rarely anything else."""
        kind = self.random.random()
        if kind < 0.6:
            return self.end_of(self.random.choice(self.adaptable)).lstrip("0123456789.") or "fc"
        if kind < 0.9:
            return self.random.choice(self.adaptable)
        return self.random.choice(
            [self.end_of(self.random.choice(self.modules)), "nothing.here"]
        )

    def names(self, most):
        return [self.name() for _ in range(self.random.randint(1, most))]

    def expression(self):
        """A regular expression, most of which match modules that can be adapted."""
        name = self.random.choice(self.adaptable)
        end, other = name.rpartition(".")[2], self.random.choice(self.adaptable)
        return self.random.choice(
            [
                rf".*\.{end}",
                rf"(.*\.)?({end}|{other.rpartition('.')[2]})",
                re.sub(r"\d+", r"\\d+", re.escape(name)),
                re.sub(r"\d+", "[0-2]", name),
                rf".*{end[1:]}",
                rf".*{re.escape(self.end_of(name))}",
                f"{re.escape(name)}|{re.escape(other)}",
                rf"(?!.*\.0\.).*{end}",
                end,
                rf".*\.{end.upper()}",
            ]
        )

    def whole_name(self):
        """A name for modules_to_save, which PEFT compares with the end, after a dot or not."""
        name = self.end_of(self.random.choice(self.modules))
        kind = self.random.random()
        if kind < 0.1:
            return name[1:] or name
        return "nothing" if kind < 0.2 else name

    def targets(self):
        """The fields that choose modules, with ranks and alphas for some of them."""
        fields = {"r": self.random.randint(1, 6), "lora_alpha": self.random.randint(1, 9)}
        if self.chance(0.3):
            fields["target_modules"] = self.expression()
        else:
            fields["target_modules"] = self.names(4) if self.chance(0.97) else []
            if self.chance(0.4):
                self._add_layers(fields)
        if self.chance(0.3):
            several = self.names(3)
            fields["exclude_modules"] = self.expression() if self.chance(0.4) else several
        if self.chance(0.35):
            fields["modules_to_save"] = [
                self.whole_name() for _ in range(self.random.randint(1, 2))
            ]
        for name, least in (("rank_pattern", 1), ("alpha_pattern", 1)):
            if self.chance(0.3):
                fields[name] = {
                    key: self.random.randint(least, 7)
                    for key in [self.random.choice([self.name, self.expression])()]
                    for key in (key, self.name())
                }
        return fields

    def _add_layers(self, fields):
        numbers = [self.random.randrange(4) for _ in range(self.random.randint(0, 3))]
        fields["layers_to_transform"] = (
            self.random.randrange(4) if self.chance(0.3) else numbers
        )
        if self.levels and self.chance(0.7):
            some = self.random.choices([*self.levels, "layer", "stages|blocks", r"\w+"], k=2)
            fields["layers_pattern"] = some if self.chance(0.4) else some[0]

    def adapter(self):
        """The fields of an adapter that PEFT can train, save and load."""
        fields = self.targets()
        while self.chance(0.5):  # more of those that choose little
            fields = self.targets()
        fields["bias"] = self.random.choice(["none", "none", "lora_only", "all"])
        kind = self.random.random()
        if kind < 0.3:
            fields["use_dora"] = True
        elif kind < 0.4 and fields["bias"] == "none":
            fields["lora_bias"] = True
        fields["use_rslora"] = self.chance(0.3)
        if self.chance(0.3):
            fields["lora_dropout"] = 0.1
        return fields
