import { useSignal } from "@preact/signals";
import { number, t } from "../i18n";
import { shown } from "./series";
import { Swatch } from "./chart";
import { details } from "./state";

/** What the models wrote at a step, and a slider through the steps; the newest unless it is moved. */
export function Samples(props: { ids: string[] }) {
  const at = useSignal<number | null>(null); // null: follow the newest
  const runs = props.ids.map((id) => details.value[id]?.samples ?? []);
  const steps = [...new Set(runs.flat().map((each) => each.step))];
  steps.sort((a, b) => a - b);
  if (!steps.length) return null;
  const index = at.value === null ? steps.length - 1 : lastUpTo(steps, at.value);
  const step = steps[index]!;
  const texts = runs.flatMap((samples, at) => {
    const reached = samples[lastUpTo(samples.map((each) => each.step), step)]?.step;
    return samples
      .filter((each) => each.step === reached && each.step <= step)
      .map((sample) => ({ at, sample }));
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
            at.value = chosen === steps.length - 1 ? null : steps[chosen]!;
          }}
        />
      )}
      {prompts.map((prompt) => (
        <figure key={prompt} class="sample">
          <figcaption>{prompt}</figcaption>
          {texts
            .filter(({ sample }) => sample.prompt === prompt)
            .map(({ at, sample }, i) => (
              <p key={i}>
                {runs.length > 1 && <Swatch colour={at} />}
                {sample.text}
                {typeof sample.reward === "number" && (
                  <small>
                    {t("reward")} {shown(sample.reward)}
                  </small>
                )}
              </p>
            ))}
        </figure>
      ))}
    </section>
  );
}

/** Where the last number up to `limit` stands in rising numbers; 0 where there is none. */
function lastUpTo(numbers: number[], limit: number): number {
  return Math.max(0, numbers.findLastIndex((each) => each <= limit));
}
