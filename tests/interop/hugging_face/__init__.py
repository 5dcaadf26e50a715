"""Small models and adapters of real transformers and PEFT.

The modules here run as programs of their own, once with transformers 4.57 and once with
transformers 5, because one process can import one of them:

    python -m tests.interop.hugging_face.make FOLDER
    python -m tests.interop.hugging_face.check MODEL ADAPTER BATCH OUT
    python -m tests.interop.hugging_face.train MODEL ADAPTER BATCH OUT
"""
