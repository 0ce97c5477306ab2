import { useSignal } from "@preact/signals";
import { number, t } from "../i18n";
import { formatNumber } from "./series";
import { Swatch } from "./chart";
import { details } from "./state";

/** Samples at a step, with a slider over the steps; follows the newest step until it is moved. */
export function Samples(props: { ids: string[] }) {
  const selectedStep = useSignal<number | null>(null); // null: follow the newest
  const runs = props.ids.map((id) => details.value.get(id)?.samples ?? []);
  const steps = [...new Set(runs.flat().map((each) => each.step))];
  steps.sort((a, b) => a - b);
  if (!steps.length) return null;
  const index = selectedStep.value === null ? steps.length - 1 : lastUpTo(steps, selectedStep.value);
  const step = steps[index]!;
  const texts = runs.flatMap((samples, run) => {
    const reached = samples[lastUpTo(samples.map((each) => each.step), step)]?.step;
    return samples
      .filter((each) => each.step === reached && each.step <= step)
      .map((sample) => ({ run, sample }));
  });
  const prompts = [...new Set(texts.map(({ sample }) => sample.prompt))];
  return (
    <section class="samples">
      <h2>{t("samplesAt", { n: number(step) })}</h2>
      {steps.length > 1 && (
        <input
          type="range"
          min={0}
          max={steps.length - 1}
          value={index}
          aria-label={t("samples")}
          aria-valuetext={t("stepAt", { n: step })}
          onInput={(event) => {
            const chosen = event.currentTarget.valueAsNumber;
            selectedStep.value = chosen === steps.length - 1 ? null : steps[chosen]!;
          }}
        />
      )}
      {prompts.map((prompt) => (
        <figure key={prompt} class="sample">
          <figcaption>{prompt}</figcaption>
          {texts
            .filter(({ sample }) => sample.prompt === prompt)
            .map(({ run, sample }, i) => (
              <p key={i}>
                {runs.length > 1 && <Swatch colour={run} />}
                {sample.text}
                {typeof sample.reward === "number" && (
                  <small>
                    {t("reward")} {formatNumber(sample.reward)}
                  </small>
                )}
              </p>
            ))}
        </figure>
      ))}
    </section>
  );
}

/** Index of the last number up to `limit` in sorted numbers, or 0. */
function lastUpTo(numbers: number[], limit: number): number {
  return Math.max(0, numbers.findLastIndex((each) => each <= limit));
}
