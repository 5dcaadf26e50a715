"""On torch: timm's model with PEFT."""

import torch
import torchvision_schemas
from worker import Built


def build(task, model):
    torchvision_schemas.define()
    import peft
    import timm

    torch.set_num_threads(task["threads"])
    net = timm.create_model(model.name, **(model.small[1] if task["small"] else {}))
    rank, targets = task["rank"], model.peft
    targets = targets if isinstance(targets, str) else list(targets)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    # Batch normalisation in inference mode, as with ours; nothing else depends on the mode.
    net = peft.get_peft_model(net, config).eval()
    size = 32 if task["small"] else 224
    images = torch.randn(task["batch"], 3, size, size)
    labels = torch.arange(task["batch"])
    variables = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(variables, 1e-4)

    def step():
        loss = torch.nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def forward():
        with torch.inference_mode():
            return net(images).numpy()

    return Built(
        trained=sum(p.numel() for p in variables),
        prepare=lambda: None,  # the state is made in the first step
        trace=lambda: None,
        actions={"step": step, "forward": forward},
    )
