import { useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { composing } from "../chat/composer";
import { choose, model, models } from "../chat/state";
import { Icon } from "../components/icons";
import { Markdown } from "../components/markdown";
import { list, number, t } from "../i18n";
import { copyText } from "../platform";
import { complete, move, placeOf, promptsOf, put, ranked, toggleTie, without } from "./ranking";
import {
  count, download, file, giveUp, prompt, rankNext, ranking, refreshCount, round, sample, sampling,
  save, skip, system, takeNext, tied, told, trouble, waiting,
} from "./state"; // prettier-ignore

export function PreferencesView() {
  useEffect(() => {
    void refreshCount();
    addEventListener("keydown", onKey);
    return () => {
      removeEventListener("keydown", onKey);
      giveUp();
    };
  }, []);
  return (
    <div class="page preferences">
      <h1>{t("prefer")}</h1>
      <p class="note">{t("preferText")}</p>
      {trouble.value && (
        <div class="problem" role="alert">
          {trouble.value}
        </div>
      )}
      <Asking />
      {round.value && <Answers />}
      <div role="status" class="note told">
        {told.value}
      </div>
      <Kept />
    </div>
  );
}

function onKey(event: KeyboardEvent): void {
  const target = event.target as HTMLElement;
  if (!round.value?.sampled || composing(event) || event.ctrlKey || event.metaKey || event.altKey) return;
  if (target.matches("input, textarea, select") || target.closest("dialog")) return;
  if (/^[1-9]$/.test(event.key)) rankNext(Number(event.key) - 1);
  else if (event.key === "=") makeTie();
  else if (event.key === "Backspace") undo();
  else if (event.key === "s" || event.key === "S") skip();
  else if (event.key === "Enter" && !target.matches("button:not(.chip), a, summary")) void save();
  else return;
  event.preventDefault();
}

/** What comes next is as good as the last; where all have a place, the last two are equal. */
function makeTie(): void {
  const done = ranked(ranking.value).length;
  if (done === round.value!.answers.length) ranking.value = toggleTie(ranking.value, done - 2);
  else if (done) tied.value = !tied.value;
}

function undo(): void {
  const last = ranked(ranking.value).at(-1);
  if (last !== undefined) ranking.value = without(ranking.value, last);
  tied.value = false;
}

function Asking() {
  const problem = useSignal("");
  const chats = models.value.filter((each) => each.kind === "chat");
  const how = sampling.value;
  const under = round.value !== null && !round.value.sampled;
  const submit = (event: Event) => {
    event.preventDefault();
    void sample();
  };
  const load = async (event: Event) => {
    const input = event.currentTarget as HTMLInputElement;
    const given = input.files?.[0];
    input.value = "";
    if (!given) return;
    const found = promptsOf(await given.text());
    problem.value = found.length ? "" : t("noPrompts");
    if (!found.length) return;
    waiting.value = found;
    takeNext();
  };
  const numeric = (name: keyof typeof how, label: string, min: number, max: number, step: number) => (
    <label>
      <span>{label}</span>
      <input
        type="number"
        min={min}
        max={max}
        step={step}
        required
        value={how[name]}
        onChange={(event) => {
          const { valueAsNumber, validity } = event.currentTarget;
          if (validity.valid) sampling.value = { ...sampling.value, [name]: valueAsNumber };
        }}
      />
    </label>
  );
  return (
    <form class="form asking" onSubmit={submit}>
      <label>
        <span>{t("promptToRank")}</span>
        <textarea
          rows={3}
          required
          placeholder={t("promptHint")}
          value={prompt.value}
          onInput={(event) => (prompt.value = event.currentTarget.value)}
          onKeyDown={(event) => {
            if (event.key === "Enter" && !event.shiftKey && !composing(event)) submit(event);
          }}
        />
      </label>
      {!prompt.value && !waiting.value.length && (
        <div class="row">
          {list("examples").map((each) => (
            <button key={each} type="button" class="example" onClick={() => (prompt.value = each)}>
              {each}
            </button>
          ))}
        </div>
      )}
      <details>
        <summary>{t("systemPrompt")}</summary>
        <textarea
          rows={2}
          aria-label={t("systemPrompt")}
          value={system.value}
          onInput={(event) => (system.value = event.currentTarget.value)}
        />
      </details>
      <div class="grid">
        <label>
          <span>{t("model")}</span>
          <select value={model.value?.id ?? ""} onChange={(event) => choose(event.currentTarget.value)}>
            {!chats.length && <option value="">{t("noModel")}</option>}
            {chats.map((each) => (
              <option key={each.id} value={each.id}>
                {each.id}
              </option>
            ))}
          </select>
        </label>
        {numeric("n", t("answers"), 2, 4, 1)}
        {numeric("temperature", t("temperature"), 0.05, 2, 0.05)}
        {numeric("max_tokens", t("maxTokens"), 1, 8192, 1)}
      </div>
      <div class="row">
        {under ? (
          // Keyed: one button that became the other amid its click would send the form.
          <button key="stop" type="button" onClick={giveUp}>
            <Icon name="stop" /> {t("stop")}
          </button>
        ) : (
          <button
            key="sample"
            type="submit"
            class={round.value ? "" : "primary"}
            disabled={!prompt.value.trim() || model.value === null}
          >
            {t("sampleThem")}
          </button>
        )}
        <label class="button">
          {t("promptList")}
          <input
            class="sr-only"
            type="file"
            accept=".jsonl,.json,.txt,application/json,text/plain"
            onChange={load}
          />
        </label>
        {waiting.value.length > 0 && (
          <span class="note">{t("promptsLeft", { n: number(waiting.value.length) })}</span>
        )}
        {waiting.value.length > 0 && round.value === null && (
          // Where nothing can be ranked there is nothing to skip either.
          <button type="button" onClick={takeNext}>
            {t("nextPrompt")}
          </button>
        )}
        <span role="status">{problem.value}</span>
      </div>
    </form>
  );
}

function Answers() {
  const at = round.value!;
  const section = useRef<HTMLElement>(null);
  useEffect(() => {
    // Away from the form, where Enter would sample again.
    if (at.sampled) section.current?.focus({ preventScroll: true });
    section.current?.scrollIntoView({ block: "start" });
  }, [at.sampled]);
  return (
    <section class="ranking" ref={section} tabindex={-1} aria-label={t("prefer")}>
      <div class="cards">
        {at.answers.map((answer, i) => {
          const place = placeOf(ranking.value, i);
          return (
            <article
              key={i}
              class={place === null ? "card" : "card placed"}
              aria-label={t("answerAt", { n: i + 1 })}
            >
              <header
                draggable={at.sampled}
                onDragStart={(event) => event.dataTransfer!.setData("text/plain", String(i))}
              >
                <kbd>{i + 1}</kbd>
                <span class="note grow">
                  {at.sampled && (place === null ? t("notRanked") : t("placeOf", { n: place }))}
                  {answer.finish === "length" && ` · ${t("cutShort")}`}
                </span>
                {at.sampled && (
                  <button
                    type="button"
                    class="quiet"
                    disabled={place !== null}
                    aria-label={t("rankNext", { n: i + 1 })}
                    title={t("rankNext", { n: i + 1 })}
                    onClick={() => rankNext(i)}
                  >
                    <Icon name="check" />
                  </button>
                )}
              </header>
              <Markdown text={answer.text} finished={at.sampled} />
            </article>
          );
        })}
      </div>
      {at.sampled && <Strip count={at.answers.length} />}
    </section>
  );
}

/** The order so far: to drag, to move with the arrow keys, and to say what is equal. */
function Strip(props: { count: number }) {
  const order = ranked(ranking.value);
  const drop = (event: DragEvent, before: number | null) => {
    event.preventDefault();
    event.stopPropagation();
    const answer = Number(event.dataTransfer!.getData("text/plain"));
    if (Number.isInteger(answer) && answer < props.count) ranking.value = put(ranking.value, answer, before);
  };
  const over = (event: DragEvent) => event.preventDefault();
  const onKeyDown = (event: KeyboardEvent, answer: number) => {
    const by = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    ranking.value = move(ranking.value, answer, by as 1 | -1);
  };
  return (
    <div class="strip">
      <ol aria-label={t("ranking")} onDragOver={over} onDrop={(event) => drop(event, null)}>
        {!order.length && <li class="note">{t("ranking")}</li>}
        {order.map((answer, i) => {
          const equal = i < order.length - 1 && placeOf(ranking.value, answer) === placeOf(ranking.value, order[i + 1]!);
          return (
            <li key={answer} onDragOver={over} onDrop={(event) => drop(event, answer)}>
              <button
                type="button"
                class="chip"
                draggable
                aria-label={`${t("answerAt", { n: answer + 1 })}, ${t("placeOf", { n: placeOf(ranking.value, answer)! })}`}
                onDragStart={(event) => event.dataTransfer!.setData("text/plain", String(answer))}
                onKeyDown={(event) => onKeyDown(event, answer)}
              >
                {answer + 1}
              </button>
              {i < order.length - 1 && (
                <button
                  type="button"
                  class="quiet relation"
                  aria-label={t(equal ? "asGoodAs" : "betterThan")}
                  title={t(equal ? "asGoodAs" : "betterThan")}
                  onClick={() => (ranking.value = toggleTie(ranking.value, i))}
                >
                  {equal ? "=" : ">"}
                </button>
              )}
            </li>
          );
        })}
        {tied.value && <li class="note">=</li>}
      </ol>
      <div class="row">
        <button type="button" disabled={!order.length} onClick={undo}>
          {t("undo")}
        </button>
        <button type="button" onClick={skip}>
          {t("skipThis")}
        </button>
        <button
          type="button"
          class="primary"
          disabled={!complete(ranking.value, props.count)}
          onClick={() => void save()}
        >
          {t("saveRanking")}
        </button>
      </div>
      <p class="note">
        {order.length === props.count && ranking.value.length === 1 ? t("allAlike") : t("rankHelp")}
      </p>
    </div>
  );
}

function Kept() {
  const copied = useSignal(false);
  const command = `khaosz train recipes/dpo.toml init_from=MODEL data=khaosz-data/${file.value}`;
  const copy = async () => {
    await copyText(command);
    copied.value = true;
    setTimeout(() => (copied.value = false), 1500);
  };
  if (count.value === null) return null;
  return (
    <section>
      <div class="row spread">
        <h2>{t("trainOnThem")}</h2>
        <span class="row">
          <span class="note">{t("count", { n: number(count.value) })}</span>
          <button type="button" disabled={!count.value} onClick={() => void download()}>
            {t("exportRankings")}
          </button>
        </span>
      </div>
      <p class="note">{t("trainText")}</p>
      <div class="command">
        <code>{command}</code>
        <button type="button" class="quiet" aria-label={t("copy")} title={t("copy")} onClick={() => void copy()}>
          <Icon name={copied.value ? "check" : "copy"} />
        </button>
      </div>
    </section>
  );
}
