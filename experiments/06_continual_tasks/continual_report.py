METHODS=("none","ntp","kl")
draw=table=verdict=None
