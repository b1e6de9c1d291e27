// The options of a request, by the names of their fields.

export const OPTIONS = ["num_inference_steps", "guidance_scale", "seed", "output_size", "output_format", "quality"];
const MAX_SEED = 2n ** 63n - 1n;

const find = (id) => document.getElementById(id);

/** Sets the service's own values; the steps are those of the quality, until somebody sets others. */
export function setOptions(settings) {
  const steps = find("num_inference_steps"), quality = find("quality");
  const usual = () => String(quality.value === "fast" ? settings.fast_steps : settings.steps);
  quality.value = settings.quality;
  find("guidance_scale").value = settings.guidance;
  let own = (steps.value = usual());
  quality.addEventListener("change", () => {
    if (steps.value !== own) return;
    own = steps.value = usual();
    steps.dispatchEvent(new Event("input"));
  });
}

/** Why the value of an option cannot be sent, or null. */
export function refusalOf(name) {
  const input = find(name);
  const text = input.value.trim();
  if (name === "seed") {
    return /^(-1|\d{1,19})$/.test(text) && BigInt(text) <= MAX_SEED ? null : "A whole number, or -1.";
  }
  if (input.type !== "number" || input.validity.valid) return null;
  return `A ${input.step === "1" ? "whole " : ""}number from ${input.min} to ${input.max}.`;
}

/** The values of all options, none of which is refused; numbers as they are commonly written, whatever was typed. */
export function optionValues() {
  return Object.fromEntries(OPTIONS.map((name) => [name, valueOf(name, find(name))]));
}

function valueOf(name, input) {
  if (name === "seed") return String(BigInt(input.value.trim()));
  return input.type === "number" ? String(input.valueAsNumber) : input.value;
}
