"""Why a model answers as it does: heat maps over its pictures."""
