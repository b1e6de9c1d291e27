// The options of a request, by the names of their fields.

export const OPTIONS = ["num_inference_steps", "guidance_scale", "seed", "output_size", "output_format", "quality"];
const MAX_SEED = 2n ** 63n - 1n;

const find = (id) => document.getElementById(id);

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
