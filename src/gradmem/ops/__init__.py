"""Operations with a closed-form second derivative, and the patching of models that lets them use these."""
