"""Operations whose second derivative has a closed form, and how models are made to use them."""
