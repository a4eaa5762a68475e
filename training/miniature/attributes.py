"""The classifier that judges which attributes a picture shows, and its training: python attributes.py"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from captions import PERSON
from pictures import Pictures, load_pictures, to_unit

WEIGHTS = Path(__file__).parent / "attributes.safetensors"


class AttributeClassifier(nn.Module):
    """Pictures (B, 3, 32, 32) in -1..1 to one row of logits an attribute, and the features (B, 128) beneath them."""

    def __init__(self) -> None:
        super().__init__()
        layers, channels = [], 3
        for width, stride in ((32, 1), (64, 2), (64, 1), (96, 2), (128, 2)):
            layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.BatchNorm2d(width), nn.SiLU()]
            channels = width
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 128), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(words)) for name, words in PERSON.items()})

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.body(pictures)

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.features(pictures)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def obeyed(self, pictures: torch.Tensor, attributes: list[dict], stated: list[list[str]]) -> torch.Tensor:
        """For every attribute that a caption states, whether the picture shows it: (number stated,) booleans."""
        guess = {name: logits.argmax(1) for name, logits in self(pictures).items()}
        return torch.tensor(
            [
                PERSON[name][int(guess[name][i])] == attributes[i][name]
                for i, names in enumerate(stated)
                for name in names
            ]
        )


def load_classifier() -> AttributeClassifier:
    classifier = AttributeClassifier()
    classifier.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()}, strict=False)
    return classifier.eval()


def labels(pictures: Pictures) -> dict[str, torch.Tensor]:
    return {
        name: torch.tensor([words.index(attributes[name]) for attributes in pictures.attributes])
        for name, words in PERSON.items()
    }


def train(epochs: int, batch: int, seed: int) -> None:
    torch.manual_seed(seed)
    pictures = load_pictures("avatars", "train")
    wanted, images = labels(pictures), to_unit(pictures.images)
    classifier = AttributeClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    progress = tqdm(range(steps), desc="classifier", mininterval=5)
    for _ in progress:
        index = torch.randint(len(images), (batch,))
        # noise and blur, so that it judges what a picture shows and not how crisp it is
        pixels = images[index] + torch.randn(batch, 1, 1, 1).abs() * 0.1 * torch.randn(batch, 3, 32, 32)
        if torch.rand(()) < 0.3:
            pixels = nn.functional.avg_pool2d(nn.functional.pad(pixels, (1, 1, 1, 1), "replicate"), 3, 1)
        logits = classifier(pixels)
        losses = [
            nn.functional.cross_entropy(rows, wanted[name][index], label_smoothing=0.02)
            for name, rows in logits.items()
        ]
        loss = torch.stack(losses).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    classifier.eval()
    save_file({k: v.half() for k, v in classifier.state_dict().items() if v.is_floating_point()}, WEIGHTS)
    report()


def report() -> None:
    """Held-out accuracy: of every attribute, and of those that the captions state."""
    classifier, test = load_classifier(), load_pictures("avatars", "test")
    with torch.no_grad():
        guess = classifier(to_unit(test.images))
    for name, wanted in labels(test).items():
        print(f"{name}: {100 * float((guess[name].argmax(1) == wanted).float().mean()):.1f} %")
    obeyed = classifier.obeyed(to_unit(test.images), test.attributes, test.stated)
    print(f"stated attributes: {100 * float(obeyed.float().mean()):.2f} % of {len(obeyed)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.epochs, args.batch, args.seed)


if __name__ == "__main__":
    main()
