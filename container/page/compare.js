// Two pictures of one size, one over the other, and a slider between them.

export class Compare {
  #root;
  #slider;
  #images;

  constructor(root) {
    this.#root = root;
    this.#slider = root.querySelector("input");
    this.#images = root.querySelectorAll("img");
    this.#slider.addEventListener("input", () => this.#split());
  }

  /** Shows a photo and the result, whose proportions count: the model sees the middle of the photo. */
  async show(before, after) {
    const files = [before, after];
    this.#images.forEach((image, place) => {
      URL.revokeObjectURL(image.src);
      image.src = URL.createObjectURL(files[place]);
    });
    await Promise.all([...this.#images].map((image) => image.decode()));
    const [, result] = this.#images;
    this.#root.style.setProperty("--ratio", result.naturalWidth / result.naturalHeight);
    this.#slider.value = 50;
    this.#split();
    this.#root.hidden = false;
  }

  #split() {
    const share = this.#slider.value;
    this.#root.style.setProperty("--split", `${share}%`);
    this.#slider.setAttribute("aria-valuetext", `${share} % before, ${100 - share} % after`);
  }
}
